"""Making folders with tiny models, and adapters that do something."""

from __future__ import annotations

from pathlib import Path

import torch
from families import VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def tiny_tokenizer(size: int = VOCABULARY, end: str | None = "<end>") -> PreTrainedTokenizerFast:
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, size)}}
    core = Tokenizer(WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, unk_token="w1")


def save(folder: Path, model, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int = 7) -> None:
    """Give every adapter weight that trains a value, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
