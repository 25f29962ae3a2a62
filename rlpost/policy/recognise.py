"""Reads the parts of a pre-norm transformer by the names that Llama and the families after it use."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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


def window_of(attention: Any) -> int | None:
    """The layer's own window; Mistral's layers have the configuration's."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window
