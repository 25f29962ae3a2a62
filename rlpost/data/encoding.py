"""Encodes all rows of a source once, into flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from rlpost.data import params
from rlpost.data.batch import Pieces
from rlpost.data.codec import Codec
from rlpost.data.direction import backwards
from rlpost.data.files import Chunk
from rlpost.data.fitting import Limit, RowOutcomes, fit
from rlpost.data.flat import Block, Writer, block_of
from rlpost.data.formats import Format, encode, is_plain, texts_of, untrained_turns
from rlpost.data.layouts import Layout, ReadAs
from rlpost.data.origins import Row, written
from rlpost.data.params import Direction
from rlpost.data.plain import Plain, is_supported
from rlpost.data.unrendered import Unrendered
from rlpost.data.users import each
from rlpost.errors import DataError
from rlpost.types import Group
from rlpost.usercode.wire import Seeded

Augment = Callable[..., Mapping[str, Any]]  # called with row= and random=
_FEW = 0.1
"""Largest share of rows that need the single-row encoder; above it, all rows of a chunk use it."""


@dataclass(frozen=True)
class Encoder:
    """Encodes rows of one format as groups within a length limit."""

    form: Format
    codec: Codec
    limit: Limit
    direction: Direction = Direction.forward
    unrendered: params.Unrendered = params.Unrendered.refuse
    malformed: params.Malformed = params.Malformed.refuse

    def __call__(self, row: Row, location: str, outcomes: RowOutcomes) -> Group | None:
        """The row as a group, or None if it is dropped; adds to `outcomes`.

        Raises:
            DataError: it is malformed or too long.
        """
        try:
            group = self._encoded(row, location, outcomes)
        except DataError as error:
            if self.malformed is params.Malformed.refuse or isinstance(error, Unrendered):
                raise
            self.drop(error, outcomes)
            return None
        if group is None:
            return None
        if self.form is Format.messages:
            outcomes.counts["turns"] += untrained_turns(row, group)
        if self.direction is Direction.reverse:
            if len(group.completions) != 1:
                raise DataError(
                    f"{location}: several completions of a prompt are not one text to reverse; give each a row"
                )
            group = backwards(group, self.codec)
        fitting = fit(group, self.limit, self.codec, location, outcomes.counts)
        if fitting is not None and self.form in _COMPARED and _is_equal(fitting, self.form):
            outcomes.counts["equal"] += 1
            return None
        return fitting

    def knowing(self, rows: Sequence[Row]) -> Encoder:
        """The same encoder, its texts of these rows tokenised together: one by one takes ten times as long."""
        if len(rows) < 2 or self.form is Format.recorded:
            return self
        given = [text for row in rows for text in texts_of(row, self.form) if type(text) is str]
        return replace(self, codec=self.codec.knowing(given))

    def drop(self, error: DataError, outcomes: RowOutcomes) -> None:
        """Count a row that is dropped because it breaks its format."""
        outcomes.counts["malformed"] += 1
        outcomes.first.setdefault("malformed", str(error))

    def _encoded(self, row: Row, location: str, outcomes: RowOutcomes) -> Group | None:
        """The row as a group; None if its chat template leaves out a part, and such rows are dropped."""
        try:
            return encode(row, self.form, self.codec, location)
        except Unrendered as error:
            if self.unrendered is params.Unrendered.refuse:
                raise
            kind = "unrendered" if self.unrendered is params.Unrendered.drop else "ignored"
            outcomes.counts[kind] += 1
            outcomes.first.setdefault(kind, f"{location}: {error.left_out}")
            if self.unrendered is params.Unrendered.drop:
                return None
            return encode(row, self.form, replace(self.codec, strict=False), location)


_COMPARED = (Format.pair, Format.triple, Format.ranked, Format.ranked_pair)
"""Formats whose completions are compared with each other."""


def _is_equal(group: Group, form: Format) -> bool:
    """Whether all compared completions are equal: their gradient is rounding, which Adam scales up to full steps."""
    of_pair = form in (Format.pair, Format.triple)
    compared = group.completions[:2] if of_pair else [c for c in group.completions if c.score is not None]
    return len({(c.ids.tobytes(), c.action.tobytes()) for c in compared}) == 1


@dataclass(frozen=True)
class SourceEncoder:
    """Encodes the rows of a source and writes them to arrays."""

    encoder: Encoder
    about: str
    """The source, for messages."""
    location: Callable[[int], str]
    """A row's number -> where it comes from, for messages."""
    augment: Augment | None
    seed: int
    """Row i is augmented with seed + i here."""
    outcomes: RowOutcomes
    read_as: ReadAs

    def write(self, chunks: Iterator[Chunk], writer: Writer) -> None:
        """Encode all rows, also those that are augmented anew later, to find errors before training.

        Raises:
            DataError: one is malformed or too long. ModelError: a chat template is missing.
        """
        self.read_as.check_template(self.encoder.codec.template, self.about)
        for chunk in chunks:
            for block in self._blocks(chunk):
                if block.lines:
                    writer.add(block)
            self.outcomes.counts["read"] += len(chunk.rows)

    def _blocks(self, chunk: Chunk) -> Iterator[Block]:
        if self.augment is not None:
            yield self._augmented(chunk, self.augment)
            return
        encoder = self.encoder
        drops = encoder.malformed is params.Malformed.drop
        chunk = self.read_as.chunk(
            chunk, self.location, partial(encoder.drop, outcomes=self.outcomes) if drops else None
        )
        if not chunk.rows:
            return
        if not is_supported(encoder.form) or encoder.direction is Direction.reverse:
            yield self._one_by_one(chunk)
            return
        plain = Plain(chunk.rows, encoder.form, encoder.codec, encoder.limit.max_length)
        if np.count_nonzero(~plain.clean) > _FEW * len(chunk.rows):
            yield self._one_by_one(chunk)
            return
        for first, last in _runs(plain.clean):
            some = _part(chunk, first, last)
            if not plain.clean[first]:
                yield self._one_by_one(some)
                continue
            self._count(last - first, int(np.count_nonzero(plain.unformatted[first:last])))
            yield plain.block(np.arange(first, last), self._lines(some), some.numbers)

    def _one_by_one(self, chunk: Chunk) -> Block:
        encoder = self.encoder.knowing(chunk.rows)
        found = [
            encoder(row, self.location(n), self.outcomes) for row, n in zip(chunk.rows, chunk.numbers, strict=True)
        ]
        kept = [i for i, group in enumerate(found) if group is not None]
        groups = [group for group in found if group is not None]
        self._count_groups(groups)
        lines = self._lines(chunk)
        # Of a recorded rollout, keep its example instead of its line.
        own = [
            lines[i] if g.example is chunk.rows[i] else written(g.example, self.location(chunk.numbers[i]))
            for i, g in zip(kept, groups, strict=True)
        ]
        return block_of(groups, own, [chunk.numbers[i] for i in kept])

    def _augmented(self, chunk: Chunk, augment: Augment) -> Block:
        first = self.outcomes.counts["read"]
        locations = [self.location(n) for n in chunk.numbers]
        layout = self.read_as.layout
        rows = augmented(
            augment, chunk.rows, range(self.seed + first, self.seed + first + len(locations)), locations, layout
        )
        encoder = self.encoder.knowing(rows)
        groups = [encoder(row, location, self.outcomes) for row, location in zip(rows, locations, strict=True)]
        self._count_groups([group for group in groups if group is not None])
        nothing = Pieces(np.zeros(0, np.int32), np.zeros(0, np.int64))
        return Block(self._lines(chunk), chunk.numbers, np.zeros(len(locations), np.int64), nothing)

    def _lines(self, chunk: Chunk) -> Sequence[bytes]:
        if chunk.lines is not None:
            return chunk.lines
        return [written(row, self.location(n)) for row, n in zip(chunk.rows, chunk.numbers, strict=True)]

    def _count_groups(self, groups: Sequence[Group]) -> None:
        template, form = self.encoder.codec.template, self.encoder.form
        plain = 0 if template is None else sum(is_plain(g.example, form, template.stop) for g in groups)
        self._count(len(groups), plain)

    def _count(self, kept: int, plain: int) -> None:
        self.outcomes.counts["kept"] += kept
        if plain and self.encoder.codec.template is not None:
            self.outcomes.plain[self.about] = self.outcomes.plain.get(self.about, 0) + plain


def augmented(
    augment: Augment,
    rows: Sequence[Row],
    seeds: Sequence[int],
    locations: Sequence[str],
    layout: Layout | None = None,
) -> list[Row]:
    """What `augment` makes of the rows this time, with the columns that `layout` adds.

    Raises:
        DataError: augmenting one failed, or it breaks the layout.
    """
    calls = [{"row": dict(row), "random": Seeded(seed)} for row, seed in zip(rows, seeds, strict=True)]
    made = []
    for found, location in zip(each(augment, calls, [f"{p}: augment" for p in locations]), locations, strict=True):
        if not isinstance(found, Mapping):
            raise DataError(f"{location}: augment returned {type(found).__name__}: return a row (a dict)")
        made.append(dict(found) if layout is None else layout(dict(found), location))
    return made


def _part(chunk: Chunk, first: int, last: int) -> Chunk:
    some = slice(first, last)
    return Chunk(chunk.rows[some], chunk.numbers[some], chunk.lines and chunk.lines[some])


def _runs(flags: Any) -> Iterator[tuple[int, int]]:
    """(begin, end) of runs of equal flags."""
    bounds = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return pairwise(bounds)
