"""Reads the parts of a pre-norm transformer by the names that Llama and the families after it use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlpost.policy import adapters
from rlpost.policy.fast_layers import FastLinear


class NotRecognised(Exception):
    """A model has something that would be ignored or computed in another way."""


def part(module: Any, name: str) -> Any:
    """An attribute of a module.

    Raises:
        NotRecognised: there is none.
    """
    found = getattr(module, name, None)
    if found is None:
        raise NotRecognised(f"{type(module).__name__} has no {name}")
    return found


def norm_of(module: Any) -> tuple[Tensor, float]:
    """The weight and ε of an RMSNorm.

    Raises:
        NotRecognised: it is something else.
    """
    eps = getattr(module, "variance_epsilon", None)
    if eps is None or set(dict(module.named_parameters())) != {"weight"}:
        raise NotRecognised(f"{type(module).__name__} is not an RMSNorm")
    return module.weight, float(eps)


def linear_of(module: Any) -> nn.Linear:
    """A linear layer, without its adapters.

    Raises:
        NotRecognised: it is something else.
    """
    base = module.get_base_layer() if adapters.is_lora(module) else module
    if type(base) not in (nn.Linear, FastLinear):  # a quantised one is derived from it
        raise NotRecognised(f"a layer is {type(base).__name__}")
    found: nn.Linear = base
    return found


def layer_matrices(model: Any, named: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Which of some parameters are matrices of linear layers between a model's embeddings and its output head.

    Low-rank adapters of such layers are two linear layers in a row. Stacked experts, gains, biases, embeddings and
    the head, and adapters of these two, are none.

    Args:
        model: a transformers causal language model.
        named: parameters, of the model and others.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends += [m for m in model.modules() if isinstance(m, nn.Embedding)]
    outside = {id(p) for m in ends for p in m.parameters()}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    return frozenset(name for name, p in named.items() if p.ndim == 2 and id(p) in linear - outside)


def window_of(attention: Any) -> int | None:
    """The layer's own window; Mistral's layers have the configuration's."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window
