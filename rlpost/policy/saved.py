"""A policy written as transformers or peft load it, and read back: what lies there is what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlpost.errors import ModelError
from rlpost.policy.adapter_files import read_adapter
from rlpost.policy.adapters import POLICY, adapter_state, save_adapter
from rlpost.policy.policy import Policy


def save_policy(policy: Policy, folder: Path, adapter: str = POLICY) -> None:
    """Write the whole model, or one adapter alone; its tokenizer; and the tokens that end what it writes.

    Raises:
        ModelError: what was written is not the policy.
    """
    if policy.has_adapter:
        save_adapter(policy.model, folder, adapter)
        policy.causal_lm.generation_config.save_pretrained(folder)
        _must_be_adapter(policy, folder, adapter)
    else:
        policy.model.save_pretrained(folder)
        _must_be_model(policy.model, folder)
    policy.tokenizer.save_pretrained(folder)


def name_ends(policy: Policy) -> None:
    """The model's generation configuration names every token that ends what the policy writes.

    Whoever generates with a result (transformers, vLLM) stops at these, and its tokenizer names one of them alone.
    """
    config = policy.causal_lm.generation_config
    ends = list(policy.end_ids)
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None:
        config.pad_token_id = policy.tokenizer.pad_token_id


def _must_be_adapter(policy: Policy, folder: Path, adapter: str) -> None:
    saved = read_adapter(folder)
    state = adapter_state(policy.model, adapter)
    _must_equal(state, saved.weights, folder)
    if state.keys() != saved.weights.keys():
        odd = sorted(state.keys() ^ saved.weights.keys())[0]
        raise ModelError(f"{folder}: the adapter as written and as trained differ in {odd}")


def _must_be_model(model: Any, folder: Path) -> None:
    """Every weight is there as it is in memory; where names are others in files, the numbers are in sum."""
    state = model.state_dict()
    seen: set[str] = set()
    others: list[Tensor] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                x = opened.get_tensor(name)
                if name in state:
                    seen.add(name)
                    _must_equal(state, {name: x}, folder)
                else:
                    others.append(_measure(x))
    written = {state[name].data_ptr() for name in seen}
    left = {name: x for name, x in state.items() if name not in seen and x.data_ptr() not in written}
    nothing = torch.zeros(2, dtype=torch.float64)
    if not torch.allclose(sum(map(_measure, left.values()), nothing), sum(others, nothing), rtol=1e-6, atol=0):
        name = next(iter(left), "a weight")
        raise ModelError(f"{folder}: the model as written and as trained differ, in {name} for one")


def _must_equal(state: Mapping[str, Tensor], written: Mapping[str, Tensor], folder: Path) -> None:
    for name in state.keys() & written.keys():
        if not torch.equal(state[name].cpu(), written[name]):
            raise ModelError(f"{folder}: {name} as written is not as trained; is the disk sound?")


def _measure(x: Tensor) -> Tensor:
    """[2] how many numbers, and the sum of their magnitudes: the same however they are cut and stacked."""
    return torch.tensor([x.numel(), float(x.double().abs().sum())], dtype=torch.float64)
