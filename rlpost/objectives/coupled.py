"""Makes losses that couple completions additive over micro-batches: one pass for the slope, one to minimise with it.

Sorting, or a mean over the update, needs all completions at once; a micro-batch has some. So the loss is first computed
on the numbers of the whole update (all parts, all ranks) without gradient to the model, and differentiated by them.
Each part then minimises Σ slope·number, whose gradient is the loss's own by the chain rule, however the update is cut.
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
