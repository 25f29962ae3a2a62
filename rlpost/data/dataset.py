"""A stage's dataset: sources, encoded once, in an endless order that can be resumed exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from rlpost.data.codec import Codec
from rlpost.data.fitting import Limit, RowOutcomes
from rlpost.data.formats import DataRole, row_texts
from rlpost.data.layouts import read_as
from rlpost.data.order import Draw, Order
from rlpost.data.origins import Bind, label
from rlpost.data.params import AUGMENT, Malformed, Source
from rlpost.data.part import Check, Part, Shelf, open_part
from rlpost.data.sources import open_source
from rlpost.errors import DataError, RecipeError
from rlpost.types import Group

_AT_ONCE = 512
"""Rows that `every` reads at a time."""


class Dataset:
    """The rows of a stage as groups, drawn in order."""

    def __init__(self, parts: Sequence[Part], limit: Limit, seed: int, allow_change: bool = False) -> None:
        self._parts = list(parts)
        self._limit = limit
        self._seed = seed
        self._allow_change = allow_change
        self._order = Order([len(p) for p in parts], [p.weight for p in parts], seed)

    def __len__(self) -> int:
        """Rows of all sources together."""
        return sum(len(part) for part in self._parts)

    @property
    def sizes(self) -> list[int]:
        """Rows of each source, in their order."""
        return [len(part) for part in self._parts]

    @property
    def epoch_length(self) -> int:
        """Rows of one epoch: of all sources together."""
        return self._order.epoch_length

    @property
    def is_augmented(self) -> bool:
        """Whether rows change every time they are drawn."""
        return any(part.augment is not None for part in self._parts)

    @property
    def notices(self) -> list[str]:
        """Messages for the user: the formats recognised, and rows dropped, cut or changed."""
        lines = [f"{p.label}: {len(p)} rows, read as {p.read_as.said}" for p in self._parts]
        return [*lines, *self.outcomes.notices(self.max_length)]

    @property
    def outcomes(self) -> RowOutcomes:
        """Counts of rows kept, dropped, cut and changed."""
        outcomes = RowOutcomes()
        for part in self._parts:
            outcomes.add(part.outcomes)
        return outcomes

    @property
    def max_length(self) -> int:
        """The longest that a row may be."""
        return self._limit.max_length

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all rows and weights, 16 hexadecimal digits."""
        about = [[part.weight, part.flat.about["rows"], part.named] for part in self._parts]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def next(self, n: int) -> list[Group]:
        """The next `n` groups.

        Raises:
            DataError: a row as augmented this time is malformed or too long.
        """
        drawn: list[Group] = []
        dropped = 0
        while len(drawn) < n:
            draws = [self._order.next() for _ in range(n - len(drawn))]
            groups = self._drawn(draws)
            drawn += [group for group in groups if group is not None]
            dropped += groups.count(None)
            if dropped > 10 * max(len(self), n):
                about = self._parts[draws[-1].source].label
                raise DataError(f"{about}: rows as augmented are all longer than {self._limit.max_length} tokens")
        return drawn

    def _drawn(self, draws: Sequence[Draw]) -> list[Group | None]:
        """The groups of the draws, in order; None for a row that is dropped as augmented this time."""
        groups: dict[Draw, Group | None] = {}
        for source, part in enumerate(self._parts):
            own = [draw for draw in draws if draw.source == source]
            found = part.groups([draw.row for draw in own], [draw.seed for draw in own])
            groups |= dict(zip(own, found, strict=True))
        return [groups[draw] for draw in draws]

    def every(self) -> Iterator[Group]:
        """Every row once, in the order of the sources; does not advance `next`."""
        for group, _ in self.located():
            yield group

    def located(self) -> Iterator[tuple[Group, str]]:
        """Every row as `every` gives it, with its location, for messages."""
        for part in self._parts:
            for first in range(0, len(part), _AT_ONCE):
                rows = range(first, min(first + _AT_ONCE, len(part)))
                found = part.groups(rows, [self._seed + i for i in rows])
                for i, group in zip(rows, found, strict=True):
                    if group is not None:
                        yield group, part.location(part.flat.number(i))

    def all(self) -> list[Group]:
        """All of `every`."""
        return list(self.every())

    def state(self) -> dict[str, Any]:
        """The position in the data, as JSON."""
        return {"order": self._order.state(), "fingerprint": self.fingerprint}

    def load(self, state: Mapping[str, Any], *, allow_change: bool = False) -> None:
        """Continue from `state()` with the same groups that would have followed.

        Raises:
            DataError: the rows have changed since (`allow_change`, here or when it was opened, allows that if
            their number is the same).
        """
        if state["fingerprint"] != self.fingerprint and not (allow_change or self._allow_change):
            raise DataError(
                f"the data has changed since this run began ({state['fingerprint']} -> {self.fingerprint}): "
                "restore it, pass --allow-change, or start another run with run=NAME"
            )
        self._order.load(state["order"])


def open_dataset(
    sources: Mapping[str, Source],
    codec: Codec,
    *,
    need: DataRole,
    limit: Limit,
    seed: int,
    where: str,
    stages: Callable[[str], Path],
    bind: Bind,
    base: Path = Path(),
    allow_change: bool = False,
    shelf: Shelf | None = None,
    check: Check | None = None,
) -> Dataset:
    """Read and encode `sources`, at key path `where`, in a format for `need`.

    Rows cached on the `shelf` are not read again; without a shelf they are kept in memory. `check` is applied to rows
    that no stage wrote and that are not augmented by a function.

    Raises:
        DataError: a source cannot be read, a row is malformed or too long, or none is left.
        ModelError: rows are conversations and there is no chat template.
    """
    if not sources:
        raise RecipeError(f"{where} names no source: give at least one, like {where}: {{main: {{path: FILE.jsonl}}}}")
    parts = []
    for name, source in sources.items():
        key = f"{where}.{name}"
        reading = open_source(source, stages=stages, where=key, bind=bind, base=base)
        augment = bind(source.augment, AUGMENT, f"{key}.augment", base) if source.augment else None
        own = check if source.stage is None and augment is None else None
        parts.append(open_part(source, key, reading, augment, need, codec, limit, seed, shelf, own))
    return Dataset(parts, limit, seed, allow_change)


def texts(
    sources: Mapping[str, Source],
    *,
    where: str,
    stages: Callable[[str], Path],
    bind: Bind,
    base: Path = Path(),
) -> list[str]:
    """All text of the sources' rows, for training a tokenizer.

    Raises:
        DataError: a source cannot be read, or has no text in the columns of a format.
    """
    found: list[str] = []
    for name, source in sources.items():
        about = label(source, f"{where}.{name}")
        reading = open_source(source, stages=stages, where=f"{where}.{name}", bind=bind, base=base)
        chunks = reading.chunks()
        first = next(chunks)
        before, convert = len(found), None
        drop = (lambda _: None) if source.malformed is Malformed.drop else None
        if not any(row_texts(row) for row in first.rows):
            convert = read_as(first.rows, about, None, source.columns)
        for chunk in chain([first], chunks):
            rows = convert.chunk(chunk, reading.location, drop).rows if convert else chunk.rows
            found += [text for row in rows for text in row_texts(row)]
        if len(found) == before:
            raise DataError(f"{about} holds no text")
    return found
