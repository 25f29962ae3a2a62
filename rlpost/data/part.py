"""One source of a stage's data: its rows, encoded once and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import rlpost.data
from rlpost.data.codec import Codec
from rlpost.data.columns import Naming
from rlpost.data.encoding import Augment, Encoder, SourceEncoder, augmented
from rlpost.data.files import Chunk
from rlpost.data.fitting import Limit, RowOutcomes
from rlpost.data.flat import Flat, Writer
from rlpost.data.formats import DataRole
from rlpost.data.layouts import ReadAs, read_as
from rlpost.data.origins import Reading, Row, identity_of, label, read_back
from rlpost.data.params import Source
from rlpost.errors import DataError
from rlpost.types import Group


class Shelf(Protocol):
    """The cache of encoded rows: `rlpost.run.shelf.Shelf`."""

    def folder(self, key: str, whose: str, fill: Callable[[Path], None]) -> Path:
        """The folder of that key; if there is no valid one, `fill` writes it. `whose` names the source."""
        ...


class Check(Protocol):
    """A further check of a source's rows while they are read."""

    @property
    def identity(self) -> Any:
        """JSON that changes when the check does."""
        ...

    def __call__(self, chunks: Iterator[Chunk], location: Callable[[int], str]) -> Iterator[Chunk]:
        """Pass the rows through; raises DataError if one is wrong."""
        ...


@dataclass(frozen=True)
class Part:
    """One source, encoded."""

    label: str
    """For messages: key path and origin."""
    weight: float
    flat: Flat
    encoder: Encoder
    location: Callable[[int], str]
    """A row's number -> its location, for messages."""
    augment: Augment | None
    outcomes: RowOutcomes
    named: Mapping[str, str]
    """The source's `columns`."""
    read_as: ReadAs

    def __len__(self) -> int:
        return len(self.flat)

    def groups(self, rows: Sequence[int], seeds: Sequence[int]) -> list[Group | None]:
        """Rows as groups; None for a row that is dropped as augmented with its seed.

        Raises:
            DataError: a row as augmented is malformed or too long.
        """
        if self.augment is None:
            return [self.flat.group(i) for i in rows]
        locations = [self.location(self.flat.number(i)) for i in rows]
        rows_now = augmented(self.augment, [self.flat.row(i) for i in rows], seeds, locations, self.read_as.layout)
        encoder = self.encoder.knowing(rows_now)
        return [encoder(row, location, RowOutcomes()) for row, location in zip(rows_now, locations, strict=True)]


def open_part(
    source: Source,
    key: str,
    reading: Reading,
    augment: Augment | None,
    need: DataRole,
    codec: Codec,
    limit: Limit,
    seed: int,
    shelf: Shelf | None,
    check: Check | None,
) -> Part:
    """Read and encode the rows of `source`, at key path `key`; or take them from the shelf.

    Raises:
        DataError: a row is malformed or too long, or none is left.
    """
    about = label(source, key)
    naming = Naming(source.columns, f"{key}.columns")

    def location(number: int) -> str:
        where = reading.location(number)
        return f"{key} ({where})" if source.path and where.startswith(source.path) else f"{about} {where}"

    def parse(line: bytes) -> Row:
        row, as_it_came = read_back(line)
        row = naming(row, about) if as_it_came else row
        return row if read.layout is None or augment or not as_it_came else read.layout(row, about)

    def write(writer: Writer) -> None:
        chunks = reading.chunks()
        first = next(chunks)  # a source without rows is refused before
        sample = first.rows[:1]
        if augment is not None:
            sample = augmented(augment, sample, [seed], [location(first.numbers[0])])
        found = read_as(sample, about, need, source.columns, source.is_made)
        encoder = Encoder(found.form, codec, limit, source.direction, source.unrendered, source.malformed)
        outcomes = RowOutcomes()
        rows: Iterator[Chunk] = chain([first], chunks)
        rows = check(rows, reading.location) if check else rows
        SourceEncoder(encoder, about, location, augment, seed, outcomes, found).write(rows, writer)
        if not outcomes.counts["kept"]:
            raise DataError(outcomes.nothing_left(about, limit.max_length))
        writer.finish({**found.to_json(), "became": outcomes.to_json()})

    if shelf is None:
        in_memory = Writer()
        write(in_memory)
        flat = Flat(in_memory.arrays(), parse)
    else:
        each_draw = [identity_of(source.augment, augment), seed] if source.augment and augment else None
        wishes = [source.direction, source.unrendered, source.malformed]
        options = [about, need, asdict(limit), *wishes, each_draw, check and check.identity]
        identity = [reading.identity(), options, codec.identity(), _code()]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        flat = Flat.mapped(shelf.folder(digest[:32], key, lambda folder: _fill(folder, write)), parse)
    read = ReadAs.from_json(flat.about)
    encoder = Encoder(read.form, codec, limit, source.direction, source.unrendered, source.malformed)
    outcomes = RowOutcomes.from_json(flat.about["became"])
    return Part(about, source.weight, flat, encoder, location, augment, outcomes, source.columns, read)


def _fill(folder: Path, write: Callable[[Writer], None]) -> None:
    writer = Writer(folder)
    try:
        write(writer)
    finally:
        writer.close()


@cache
def _code() -> str:
    """sha256 of this package's code: other code may encode rows differently."""
    digest = hashlib.sha256()
    for file in sorted(Path(rlpost.data.__path__[0]).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
