"""Losses that couple completions, made additive: one pass for their slope, a second one that follows it.

Sorting, or a mean over the update, needs all completions at once; a micro-batch has some. So the loss is first taken
on the numbers of the whole update (all parts, all ranks) without a model behind them, and differentiated there. Each
part then minimises Σ slope·number, whose gradient is the loss's own by the chain rule, whatever the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rlpost.objectives.preference import Pairs

COUPLED = frozenset({"aot", "aot_unpaired", "bco"})
"""Pair losses of which an element depends on other pairs (`bco` where it is not given its delta)."""


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


def linearised_pairs(loss: Callable[[Pairs], Tensor], pairs: Pairs, weight_P: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ loss·weight, [P, 2] its derivative with respect to Δ), for pair losses that know the policy by Δ alone.

    The second pass minimises Σ slope·Δ.

    Args:
        loss: of pairs, to one value a pair.
        pairs: those of the whole update, modifiers applied.
        weight_P: of each pair.
    """

    def weighted(delta_P2: Tensor) -> Tensor:
        return (loss(replace(pairs, ratio_P2=delta_P2)) * weight_P).sum()

    return linearised(weighted, pairs.delta_P2)
