"""A weighted sum of several losses of the same pairs, itself a loss of pairs.

Axes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from rlpost.facts import fact
from rlpost.objectives.preference import PairBatch


@dataclass(frozen=True)
class WeightedSum:
    """[P] Σ_k w_k·loss_k (as MPO has it, Wang et al. 2024, arXiv:2411.10442: w_p·DPO + w_q·BCO + w_g·NLL).

    The sum is linear: where one of its losses couples the pairs of an update, all of it is taken over the whole update.

    Raises:
        ValueError: if there is no loss, a loss without a weight, a weight that is negative or not finite, or only 0s.
    """

    losses: Mapping[str, Callable[[PairBatch], Tensor]]
    """By name, each pairs -> [P]."""
    weights: Mapping[str, float]
    """Of each loss, by the same names."""

    def __post_init__(self) -> None:
        if not self.losses or set(self.losses) != set(self.weights):
            raise ValueError(f"losses {list(self.losses)} and weights {list(self.weights)}: give one weight a loss")
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of {name} is a finite number, 0 or more, got {weight}")
        if not any(self.weights.values()):
            raise ValueError("all weights are 0, so there is nothing to minimise")

    @property
    def facts(self) -> dict[str, bool]:
        """It couples pairs, or needs a reference, if one of its losses does."""
        return {key: any(fact(f, key) for f in self.losses.values()) for key in ("couples_pairs", "needs_reference")}

    def each(self, pairs: PairBatch) -> dict[str, Tensor]:
        """Each loss, [P], by name, without its weight."""
        return {name: loss(pairs) for name, loss in self.losses.items()}

    def total(self, each: Mapping[str, Tensor]) -> Tensor:
        """[P] the sum of what `each` returned, or of other numbers by these names."""
        first, *others = (self.weights[name] * loss_P for name, loss_P in each.items())
        return sum(others, first)

    def __call__(self, pairs: PairBatch) -> Tensor:
        """[P] the weighted sum."""
        return self.total(self.each(pairs))
