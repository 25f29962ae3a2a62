"""Folders with tiny models, as a user would have them, and groups to score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exactness import sample_groups
from families import VOCABULARY, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from rlpost.groups import Group
from rlpost.policy import adapters
from rlpost.recipe.schema import Lora


def tiny_tokenizer(size: int = VOCABULARY, end: str | None = "<end>") -> PreTrainedTokenizerFast:
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, size)}}
    core = Tokenizer(WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, unk_token="w1")


def save(folder: Path, model, tokenizer=None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "llama", tiny("llama"))


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "gpt2", tiny("gpt2"))


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory, llama_folder) -> Path:
    """An adapter (r 2, alpha 4) on the Llama folder that does something."""
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    model = adapters.add_policy_adapter(tiny("llama"), Lora(r=2, alpha=4.0))
    randomise(model)
    model.peft_config[adapters.POLICY].base_model_name_or_path = str(llama_folder)
    model.save_pretrained(folder)
    # peft puts an adapter with a name of its own into a folder of that name.
    for file in (folder / adapters.POLICY).iterdir():
        file.rename(folder / file.name)
    return folder


@pytest.fixture(scope="session")
def groups() -> list[Group]:
    return sample_groups(VOCABULARY)


def randomise(model: torch.nn.Module, seed: int = 7) -> None:
    """Give every adapter weight that trains a value, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
