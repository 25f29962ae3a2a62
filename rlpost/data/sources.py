"""Reading rows.

The order is always: read, fold, map, columns, limit. So a fold sees the rows as they lie in the file (two
files with the same questions fold alike), a map sees one side of the fold, and `columns` may name what the
map made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlpost.data.columns import apply_columns, missing
from rlpost.data.files import read_jsonl, read_parquet
from rlpost.data.hub import read_hub
from rlpost.data.params import MAP, TASK, Fold, FoldPart, Source
from rlpost.data.users import each
from rlpost.errors import DataError, RecipeError
from rlpost.usercode.params import Function, Lookup

Row = dict[str, Any]


@dataclass
class Rows:
    """The rows of a source, and where each of them comes from."""

    rows: list[Row]
    places: list[str]
    """Of each row: `rows.jsonl:4`, or `row 4` of what has no lines."""


_FOLD_SEED = 0  # a fold is part of the data: no seed of a run may move rows across it


class Bind(Protocol):
    """What turns a function's name and arguments into a callable: `rlpost.recipe.functions.bind`."""

    def __call__(self, function: Function, lookup: Lookup, where: str, base: Path) -> Callable[..., Any]:
        """The callable of `function`, which stands at key path `where` of a recipe in the folder `base`."""
        ...


def read(
    source: Source,
    *,
    stages: Callable[[str], Path],
    where: str,
    bind: Bind,
    base: Path = Path(),
) -> Rows:
    """The rows of `source`: read, folded, mapped, with its columns named, the first `limit` of them.

    `stages` gives the file an earlier stage wrote, `where` is the key path for messages. Paths are looked
    for in the working directory, then in `base`, the recipe's folder.

    Raises:
        DataError: nothing there, a malformed row, a missing column, or no row left.
        RecipeError: the source itself is wrong.
    """
    found = _read(source, stages, where, bind, base)
    place = label(source, where)
    if not found.rows:
        raise DataError(f"{place} has no rows: check the file or the split")
    if source.fold is not None:
        found = _fold(found, source.fold, f"{where}.fold")
    if source.map is not None:
        found = _map(found, bind(source.map, MAP, f"{where}.map", base), f"{where}.map: {source.map.fn}", where)
    if source.columns:
        found.rows = apply_columns(found.rows, source.columns, f"{where}.columns", found.places)
    if source.limit is not None:
        if source.limit < 1:
            raise RecipeError(f"{where}.limit is {source.limit}: give at least 1, or leave it out")
        found = Rows(found.rows[: source.limit], found.places[: source.limit])
    return found


def label(source: Source, where: str) -> str:
    """How messages name the rows of `source`: key path and origin."""
    return f"{where} ({source.path or source.stage or (source.task.fn if source.task else '')})"


def _read(source: Source, stages: Callable[[str], Path], where: str, bind: Bind, base: Path) -> Rows:
    given = [name for name in ("path", "stage", "task") if getattr(source, name) is not None]
    if len(given) != 1:
        stated = " and ".join(given) if given else "none"
        raise RecipeError(f"{where}: give exactly one of path, stage, task (given: {stated})")
    if source.task is not None:
        make = bind(source.task, TASK, f"{where}.task", base)
        (made,) = each(make, [{}], [f"{where}.task: {source.task.fn}"])
        return _numbered(_checked_rows(made, f"{where}.task: {source.task.fn}"))
    if source.stage is not None:
        return _numbered(read_jsonl(stages(source.stage))[0])
    assert source.path is not None
    return _read_path(source.path, source.config, source.split, where, base)


def _read_path(path: str, config: str | None, split: str, where: str, base: Path) -> Rows:
    expanded = Path(path).expanduser()
    found = next((p for p in (expanded, base / expanded) if p.exists()), None)
    if found is None:
        return _numbered(read_hub(path, config, split, where, base))
    if found.is_dir():
        return _numbered(read_hub(str(found), config, split, where, base))
    if found.suffix == ".jsonl":
        rows, lines = read_jsonl(found)
        return Rows(rows, [f"{path}:{line}" for line in lines])
    if found.suffix == ".parquet":
        return _numbered(read_parquet(found))
    raise DataError(f"{where}.path: {path} is neither .jsonl nor .parquet: convert it, or give a folder in hub format")


def _numbered(rows: list[Row]) -> Rows:
    return Rows(rows, [f"row {number}" for number in range(1, len(rows) + 1)])


def _fold(found: Rows, fold: Fold, where: str) -> Rows:
    """One side of a split by the values of `fold.by`.

    The distinct values are sorted, shuffled by a fixed seed and dealt out to `of` parts; so the split
    depends on the set of values alone, not on the order of the rows.
    """
    if fold.of < 2 or not 0 <= fold.hold_out < fold.of:
        raise RecipeError(f"{where}: hold_out={fold.hold_out} of={fold.of}: hold_out runs from 0 to of-1, of from 2")
    keys = []
    for row, place in zip(found.rows, found.places, strict=True):
        if fold.by not in row:
            raise DataError(f"{where}.by: {place} {missing(fold.by, row)}")
        keys.append(json.dumps(row[fold.by], sort_keys=True, default=str))
    values = sorted(set(keys))
    random.Random(_FOLD_SEED).shuffle(values)
    held_out = set(values[fold.hold_out :: fold.of])
    wanted = fold.part is FoldPart.held_out
    kept = [i for i, key in enumerate(keys) if (key in held_out) is wanted]
    if not kept:
        raise DataError(f"{where}: no row is left: {fold.by} has {len(values)} distinct values for {fold.of} parts")
    return Rows([found.rows[i] for i in kept], [found.places[i] for i in kept])


def _map(found: Rows, function: Callable[..., Any], name: str, where: str) -> Rows:
    """What the function makes of each row, which keeps its place."""
    mapped = Rows([], [])
    calls = [{"row": dict(row)} for row in found.rows]
    results = each(function, calls, [f"{name}: {place}" for place in found.places])
    for result, place in zip(results, found.places, strict=True):
        if result is None:
            continue
        made = _checked_rows([result] if isinstance(result, Mapping) else result, f"{name}: {place}")
        mapped.rows += made
        mapped.places += [place] * len(made)
    if not mapped.rows:
        raise DataError(f"{name} left no row of {len(found.rows)}: check what it returns, and {where}")
    return mapped


def _checked_rows(rows: Any, place: str) -> list[Row]:
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"{place} returned {type(rows).__name__}: return a row (a dict), a list of rows, or None")
    checked = []
    for row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{place} returned a list with {type(row).__name__} in it: rows are dicts")
        checked.append(dict(row))
    return checked
