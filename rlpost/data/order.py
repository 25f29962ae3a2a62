"""The order of rows: an endless weighted mixture whose state is a few numbers."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlpost.errors import DataError


class Draw(NamedTuple):
    """One draw of a row."""

    source: int
    row: int
    """Index within the source."""
    epoch: int
    """Number of earlier passes through the source."""
    seed: int
    """Seed for presenting the row this time."""


class Order:
    """An endless order over sources: each epoch of a source is a permutation of its own.

    The next source is the one furthest behind its share: after t draws, each has had its share of t to within the
    number of sources. Which source comes next depends on the weights alone. The state is the number of draws of each
    source.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """`counts` rows and relative `weights` of the sources, both [number of sources].

        Raises:
            DataError: a source is empty, or no weight is positive.
        """
        assert len(counts) == len(weights)
        if not counts or min(counts) < 1:
            raise DataError("a source has no rows: check the data of this stage")
        if min(weights) < 0 or sum(weights) <= 0:
            raise DataError(f"weights of sources are {list(weights)}: give at least one above 0, and none below")
        self._counts = list(counts)
        self._shares = [w / sum(weights) for w in weights]
        self._seed = seed
        self._drawn = [0] * len(counts)
        self._permutations: dict[int, tuple[int, Sequence[int]]] = {}

    @property
    def epoch_length(self) -> int:
        """Draws in one epoch: the rows of the one source (of a mixture: of all sources together)."""
        return sum(self._counts)

    def next(self) -> Draw:
        """The next draw."""
        total = sum(self._drawn) + 1
        behind = [share * total - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        # Sources of weight 0 are never behind, and must not win ties.
        source = max((i for i, share in enumerate(self._shares) if share > 0), key=lambda i: (behind[i], -i))
        epoch, position = divmod(self._drawn[source], self._counts[source])
        row = self._permutation(source, epoch)[position]
        self._drawn[source] += 1
        return Draw(source, row, epoch, _presentation_seed(self._seed, source, epoch, row))

    def state(self) -> dict[str, Any]:
        """The position in the order, as JSON."""
        return {"drawn": list(self._drawn), "counts": list(self._counts)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()` of an order over the same counts.

        Raises:
            DataError: the sources have other numbers of rows now.
        """
        if state["counts"] != self._counts:
            raise DataError(
                f"the data had {state['counts']} rows when this run began and has {self._counts} now: "
                "restore it, or start another run with run=NAME"
            )
        self._drawn = [int(n) for n in state["drawn"]]

    def _permutation(self, source: int, epoch: int) -> Sequence[int]:
        kept = self._permutations.get(source)
        if kept is None or kept[0] != epoch:
            rows = array("q", range(self._counts[source]))
            random.Random(f"{self._seed}/{source}/{epoch}").shuffle(rows)
            self._permutations[source] = kept = (epoch, rows)
        return kept[1]


def _presentation_seed(seed: int, source: int, epoch: int, row: int) -> int:
    digest = hashlib.sha256(f"present {seed}/{source}/{epoch}/{row}".encode()).digest()
    return int.from_bytes(digest[:6], "big")  # 48 bits: exact in JSON wherever it is read
