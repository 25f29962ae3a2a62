"""All groups of G completions: every multiset with its probability, instead of a sample.

Axes: P multisets, G members, L leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

MOST = 200_000
"""Most multisets that are enumerated."""


@dataclass(frozen=True)
class Multisets:
    """Every group of G completions that can be drawn, without regard to order."""

    leaf_PG: Tensor
    """[P, G] the leaves, ascending along G."""
    probability_P: Tensor
    """G!/Π(multiplicities!)·Π p(leaf): sums to 1."""


def count(leaves: int, size: int) -> int:
    """The number of multisets."""
    return comb(leaves + size - 1, size)


def multisets(leaf_logp_L: Tensor, size: int) -> Multisets | None:
    """All groups of `size` independent draws of a leaf, or None where they are more than MOST."""
    leaves = len(leaf_logp_L)
    if count(leaves, size) > MOST:
        return None
    leaf_PG = torch.combinations(torch.arange(leaves), size, with_replacement=True).view(-1, size)
    orders_P = leaf_logp_L.new_ones(len(leaf_PG))
    run_P = torch.ones_like(leaf_PG[:, 0])
    for g in range(1, size):
        # (g + 1)!/Π multiplicities!, one member after the other: equal members come in a run.
        run_P = torch.where(leaf_PG[:, g] == leaf_PG[:, g - 1], run_P + 1, 1)
        orders_P = orders_P * (g + 1) / run_P
    return Multisets(leaf_PG, orders_P * leaf_logp_L[leaf_PG].sum(1).exp())
