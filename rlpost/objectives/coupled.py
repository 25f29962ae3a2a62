"""Losses that couple completions, made additive: one pass for their slope, a second one that follows it.

Sorting, or a mean over the update, needs all completions at once; a micro-batch has some. So the loss is first taken
on the numbers of the whole update (all parts, all ranks) without a model behind them, and differentiated there. Each
part then minimises Σ slope·number, whose gradient is the loss's own by the chain rule, whatever the cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def linearised(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(loss(x), its derivative with respect to x), both detached.

    Args:
        loss: of `x`, to a scalar.
        x: numbers of the whole update, of any shape.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = loss(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope
