"""Losses that couple completions, made additive: one pass for their slope, a second one that follows it.

Sorting, or a mean over the update, sees all completions at once; a micro-batch sees some. So the loss is first
taken on the log-probabilities of the whole update, without a model behind them, and differentiated there; then each
part minimises slope·log-probability. The gradient is exact, whatever the cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linearised(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(loss(x), its derivative there), both detached.

    Args:
        loss: of `x`, to a scalar.
        x: quantities of the whole update, of any shape.
    """
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope
