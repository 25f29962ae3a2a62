"""Reads a source's rows.

The order is always: read, fold, map, columns, limit. So a fold sees the rows of the file (two files with the same
questions fold alike), a map sees one side of the fold, and `columns` may name columns that the map made. Rows are read
in chunks: a file is never in memory as a whole.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpost.data.columns import Naming, missing
from rlpost.data.files import Chunk
from rlpost.data.origins import Bind, Reading, Row, checked_rows, identity_of, label, origin
from rlpost.data.params import MAP, KFold, KFoldPart, Source
from rlpost.data.users import each
from rlpost.errors import DataError, RecipeError


@dataclass
class SourceRows:
    """The rows of a source, and their locations."""

    rows: list[Row]
    locations: list[str]
    """Of each row: `rows.jsonl:4`, or `row 4` of what has no lines."""


_FOLD_SEED = 0  # a fold is part of the data: no seed of a run may move rows across it
Chunks = Iterator[Chunk]


def read(
    source: Source,
    *,
    stages: Callable[[str], Path],
    where: str,
    bind: Bind,
    base: Path = Path(),
) -> SourceRows:
    """All rows of `source` at once; arguments as of `open_source`."""
    reading = open_source(source, stages=stages, where=where, bind=bind, base=base)
    found = SourceRows([], [])
    for chunk in reading.chunks():
        found.rows += chunk.rows
        found.locations += [reading.location(n) for n in chunk.numbers]
    return found


def open_source(
    source: Source,
    *,
    stages: Callable[[str], Path],
    where: str,
    bind: Bind,
    base: Path = Path(),
) -> Reading:
    """The rows of `source`: read, folded, mapped, with its columns named, the first `limit` of them.

    `stages` gives the file an earlier stage wrote, `where` is the key path for messages. Paths are looked
    for in the working directory, then in `base`, the recipe's folder.

    Raises:
        DataError: it is missing; or, while it is read, a row is malformed, a column missing, or no row left.
        RecipeError: the source's keys are wrong.
    """
    found = origin(source, stages, where, bind, base)
    _check(source, where)
    function = bind(source.map, MAP, f"{where}.map", base) if source.map else None
    naming = Naming(source.columns, f"{where}.columns") if source.columns else None

    def chunks() -> Iterator[Chunk]:
        stream = _some(found.chunks(), label(source, where))
        if source.kfold is not None:
            stream = _fold(stream, found.chunks, source.kfold, f"{where}.kfold", found.location)
        if source.map is not None and function is not None:
            stream = _map(stream, function, f"{where}.map: {source.map.fn}", where, found.location)
        if naming is not None:
            stream = _named(stream, naming, found.location)
        return stream if source.limit is None else _first(stream, source.limit)

    def identity() -> Any:
        options = [source.kfold and source.kfold.model_dump(), source.columns, source.limit]
        return [found.identity(), options, source.map and function and identity_of(source.map, function)]

    return Reading(chunks, found.location, identity)


def _check(source: Source, where: str) -> None:
    fold = source.kfold
    if fold is not None and (fold.of < 2 or not 0 <= fold.hold_out < fold.of):
        raise RecipeError(
            f"{where}.kfold: hold_out={fold.hold_out} of={fold.of}: hold_out runs from 0 to of-1, of from 2"
        )
    if source.limit is not None and source.limit < 1:
        raise RecipeError(f"{where}.limit is {source.limit}: give at least 1, or leave it out")


def _some(chunks: Iterator[Chunk], about: str) -> Iterator[Chunk]:
    """The chunks; raises DataError if there are none."""
    first = next(chunks, None)
    if first is None:
        raise DataError(f"{about} has no rows: check the file or the split")
    yield first
    yield from chunks


def _fold(
    chunks: Iterator[Chunk],
    again: Callable[[], Iterator[Chunk]],
    fold: KFold,
    where: str,
    location: Callable[[int], str],
) -> Iterator[Chunk]:
    """One side of a split by the values of `fold.by`; `again` reads the rows a second time.

    The distinct values are sorted, shuffled with a fixed seed and dealt out to `of` parts, so the split depends on the
    set of values alone, not on the order of the rows.
    """
    distinct = {key for chunk in chunks for key in _keys(chunk, fold, where, location)}
    values = sorted(distinct)
    random.Random(_FOLD_SEED).shuffle(values)
    held_out = set(values[fold.hold_out :: fold.of])
    wanted = fold.part is KFoldPart.held_out
    left = False
    for chunk in again():
        kept = [i for i, key in enumerate(_keys(chunk, fold, where, location)) if (key in held_out) is wanted]
        left = left or bool(kept)
        if kept:
            lines = chunk.lines and [chunk.lines[i] for i in kept]
            yield Chunk([chunk.rows[i] for i in kept], [chunk.numbers[i] for i in kept], lines)
    if not left:
        raise DataError(f"{where}: no row is left: {fold.by} has {len(values)} distinct values for {fold.of} parts")


def _keys(chunk: Chunk, fold: KFold, where: str, location: Callable[[int], str]) -> Iterator[str]:
    """The value of `fold.by` in each row, as JSON."""
    for row, number in zip(chunk.rows, chunk.numbers, strict=True):
        if fold.by not in row:
            raise DataError(f"{where}.by: {location(number)} {missing(fold.by, row)}")
        yield json.dumps(row[fold.by], sort_keys=True, default=str)


def _map(
    chunks: Iterator[Chunk], function: Callable[..., Any], name: str, where: str, location: Callable[[int], str]
) -> Iterator[Chunk]:
    """The rows that the function returns; each has the number of the row it was made from."""
    read = made = 0
    for chunk in chunks:
        calls = [{"row": dict(row)} for row in chunk.rows]
        mapped = Chunk([], [])
        results = each(function, calls, [f"{name}: {location(n)}" for n in chunk.numbers])
        for result, number in zip(results, chunk.numbers, strict=True):
            if result is None:
                continue
            rows = checked_rows([result] if isinstance(result, Mapping) else result, f"{name}: {location(number)}")
            mapped.rows.extend(rows)
            mapped.numbers.extend([number] * len(rows))
        read += len(chunk.rows)
        made += len(mapped.rows)
        if mapped.rows:
            yield mapped
    if not made:
        raise DataError(f"{name} left no row of {read}: check what it returns, and {where}")


def _named(chunks: Iterator[Chunk], naming: Naming, location: Callable[[int], str]) -> Iterator[Chunk]:
    """The rows with their roles; `lines` stay those of the file."""
    for chunk in chunks:
        named = [naming(row, location(n)) for row, n in zip(chunk.rows, chunk.numbers, strict=True)]
        yield replace(chunk, rows=named)


def _first(chunks: Iterator[Chunk], limit: int) -> Iterator[Chunk]:
    """The first `limit` rows; the others are read too, to find errors."""
    for chunk in chunks:
        if limit > 0:
            yield Chunk(chunk.rows[:limit], chunk.numbers[:limit], chunk.lines and chunk.lines[:limit])
        limit -= len(chunk.rows)
