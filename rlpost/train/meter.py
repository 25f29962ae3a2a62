"""Metrics of an update: means over all its elements, whatever parts and ranks they came in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

LOSS = "loss"
BALANCE = "router_balance"
"""The balance loss of a mixture of experts, before its coefficient; 1 would be the number of experts a token has."""
SUMMED = (LOSS, BALANCE)
"""The metrics that are summed over parts and ranks, since their weights were counted over the whole update."""
Sums = dict[str, tuple[float, int]]
"""Sum and number of a metric's elements, by name."""


class Meter:
    """What one rank adds."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the elements of each 1-D tensor."""
        for name, x in values.items():
            assert x.ndim == 1, name
            # In float64: statistics such as an explained variance are differences of these means.
            own = x.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + own if name in self._sums else own
            self._counts[name] = self._counts.get(name, 0) + x.numel()

    def add_part(self, total: Tensor, metrics: Mapping[str, Tensor]) -> None:
        """Add a part's metrics and its loss, which sums up over parts."""
        self.add({LOSS: total[None], **metrics})

    def sums(self) -> Sums:
        """Sum and number of the elements so far, by name."""
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return dict(zip(self._sums, zip(sums, self._counts.values(), strict=True), strict=True))


def averages(everyone: Iterable[Sums]) -> dict[str, float]:
    """Means over the elements of all ranks, and sums for `SUMMED`; a rank may have added nothing."""
    table: Sums = {}
    for name, (total, count) in (item for one in everyone for item in one.items()):
        before = table.get(name, (0.0, 0))
        table[name] = (before[0] + total, before[1] + count)
    return {name: total if name in SUMMED else total / max(count, 1) for name, (total, count) in table.items()}


def by_term(factors: Mapping[str, float], everyone: Sequence[Mapping[str, Sums]]) -> dict[str, float]:
    """Metrics of an update's terms: as `averages`, under a term's name where it has one; `loss` is Σ factor·loss.

    Args:
        factors: of each term, by its name; empty for one without a name.
        everyone: of each rank, each term's sums by its name.
    """
    line = {LOSS: 0.0}
    for name in dict.fromkeys(["", *factors]):
        found = averages(sums[name] for sums in everyone if name in sums)
        line[LOSS] += factors.get(name, 1.0) * found.get(LOSS, 0.0)
        line |= {f"{name}/{key}" if name else key: x for key, x in found.items() if name or key != LOSS}
    return line
