"""Writes a policy as transformers or peft load it, and reads it back to compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rlpost.errors import ModelError
from rlpost.policy.adapter_files import read_adapter
from rlpost.policy.adapters import POLICY, adapter_state, save_adapter
from rlpost.policy.policy import Policy
from rlpost.policy.quantized import record
from rlpost.policy.sharded import whole_state


def whole_weights(policy: Policy) -> dict[str, Tensor] | None:
    """For `save_policy`: the weights of a model in shards, in the first rank's memory; all ranks call this."""
    return None if policy.sharding is None or policy.has_adapter else whole_state(policy.model)


def save_policy(
    policy: Policy, folder: Path, adapter: str = POLICY, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the whole model, or one adapter alone, with its tokenizer and generation configuration.

    Args:
        policy: what to write.
        folder: where.
        adapter: the adapter, if it has any.
        weights: the model's, where `whole_weights` gives them; by default those it has.

    Raises:
        ModelError: the files do not hold the policy's weights.
    """
    if policy.has_adapter:
        save_adapter(policy.model, folder, adapter, policy.revision)
        record(policy.model, folder)
        policy.causal_lm.generation_config.save_pretrained(folder)
        _must_be_adapter(policy, folder, adapter)
    else:
        policy.model.save_pretrained(folder, state_dict=weights)
        _must_be_model(policy.model.state_dict() if weights is None else weights, folder)
    policy.tokenizer.save_pretrained(folder)


def name_ends(policy: Policy) -> None:
    """Put every token that ends a completion into the model's generation configuration.

    transformers and vLLM stop at these; the tokenizer names only one of them.
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


def _must_be_model(state: Mapping[str, Tensor], folder: Path) -> None:
    """Compare every weight in the files with memory; weights saved by other names are compared by their sums."""
    compared: set[str] = set()
    others: list[Tensor] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is not a mapping
                x = opened.get_tensor(name)
                if name in state:
                    compared.add(name)
                    _must_equal(state, {name: x}, folder)
                else:
                    others.append(_measure(x))
    written = {state[name].data_ptr() for name in compared}
    left = {name: x for name, x in state.items() if name not in compared and x.data_ptr() not in written}
    nothing = torch.zeros(2, dtype=torch.float64)
    if not torch.allclose(sum(map(_measure, left.values()), nothing), sum(others, nothing), rtol=1e-6, atol=0):
        name = next(iter(left), "a weight")
        raise ModelError(f"{folder}: the model as written and as trained differ, in {name} for one")


def _must_equal(state: Mapping[str, Tensor], written: Mapping[str, Tensor], folder: Path) -> None:
    for name in state.keys() & written.keys():
        if not torch.equal(state[name].cpu(), written[name]):
            raise ModelError(f"{folder}: {name} as written is not as trained; check the disk")


def _measure(x: Tensor) -> Tensor:
    """[2] number of elements and sum of their magnitudes, which do not depend on how tensors are split or stacked."""
    return torch.tensor([x.numel(), float(x.double().abs().sum())], dtype=torch.float64)
