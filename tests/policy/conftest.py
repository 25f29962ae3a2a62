"""Folders with tiny models, as a user would have them, and groups to score."""

from __future__ import annotations

from pathlib import Path

import pytest
from exactness import sample_groups
from families import VOCABULARY, tiny
from tiny_folders import randomise, save

from rlpost.policy import adapters
from rlpost.policy.params import Lora
from rlpost.types import Group


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
