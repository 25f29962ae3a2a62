"""What both sides of the benchmark train: a model folder, and rows of lognormal lengths.

Words are drawn at random from a vocabulary of whole words, so that a row has as many tokens as it has words, on both
sides. The model of a workload that samples is trained on such rows first, so that it ends its answers by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = 4096
SHAPES: dict[str, dict[str, Any]] = {
    "6M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8},
    "50M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10},
}
"""Llamas by their size; half as many key heads as query heads."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions: lognormal, with these medians."""

    prompt: int
    completion: int
    spread: float = 0.5
    """Standard deviation of the logarithm."""
    most: int = 512
    """Of one part."""

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """[n] prompts' and completions' lengths."""
        sizes = [np.exp(rng.normal(np.log(median), self.spread, n)) for median in (self.prompt, self.completion)]
        prompt, completion = (np.clip(np.rint(s), 2, self.most).astype(int) for s in sizes)
        return prompt, completion


def make_model(folder: Path, size: str, positions: int = 2048) -> Path:
    """A Llama of random weights with its tokenizer, as a folder."""
    torch.manual_seed(0)
    shape = SHAPES[size]
    config = AutoConfig.for_model(
        "llama",
        **shape,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        vocab_size=WORDS,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    words = {"<end>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    return folder


def write_rows(file: Path, kind: str, n: int, lengths: Lengths, seed: int = 0) -> int:
    """Rows of `sft`, `dpo` or `grpo`; returns the tokens of all, each prompt counted once."""
    rng = np.random.default_rng(seed)
    prompt, completion = lengths.draw(rng, n)
    _, other = lengths.draw(rng, n)
    total = 0
    with file.open("w") as out:
        for p, c, r in zip(prompt.tolist(), completion.tolist(), other.tolist(), strict=True):
            row = {"prompt": _text(rng, p)}
            if kind == "sft":
                row["completion"] = " " + _text(rng, c)
                total += p + c + 1
            elif kind == "dpo":
                row |= {"chosen": " " + _text(rng, c), "rejected": " " + _text(rng, r)}
                total += p + c + r + 2
            out.write(json.dumps(row) + "\n")
    return total


def _text(rng: np.random.Generator, n: int) -> str:
    # Zipf's law, so that there is something to learn.
    ranks = np.minimum(rng.zipf(1.3, n) + 1, WORDS - 1)
    return " ".join(f"w{i}" for i in ranks.tolist())
