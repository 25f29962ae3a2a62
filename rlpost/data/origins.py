"""Origins of a source's rows: a file, a folder, the hub, a task, or an earlier stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from rlpost.data.compressed import COMPRESSED, kind_of
from rlpost.data.files import Chunk, in_chunks, read_jsonl, read_parquet
from rlpost.data.hub import SUFFIXES, open_hub, refuse_missing_file
from rlpost.data.params import TASK, Source
from rlpost.data.tables import is_array, read_array, read_csv
from rlpost.data.users import each
from rlpost.errors import DataError, RecipeError
from rlpost.usercode import wire
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import Function, Lookup

Row = dict[str, Any]
Json = Any
_DIGESTS: dict[str, str] = {}
"""Task of rlpost, as JSON -> digest of its rows: several stages have the same ones, and each is opened twice."""


class Bind(Protocol):
    """Makes a callable of a function's name and arguments: `rlpost.usercode.binding.bind`."""

    def __call__(self, function: Function, lookup: Lookup, where: str, base: Path) -> Callable[..., Any]:
        """The callable of `function`, at key path `where` of a recipe in the folder `base`."""
        ...


@dataclass(frozen=True)
class Reading:
    """Rows that can be read repeatedly."""

    chunks: Callable[[], Iterator[Chunk]]
    """Reads the rows in chunks. May raise DataError or RecipeError at any chunk."""
    location: Callable[[int], str]
    """A row's number -> `rows.jsonl:4`, or `row 4` of what has no lines."""
    identity: Callable[[], Json]
    """JSON that changes when the rows do: digests of files, options, functions. Raises as `chunks` does."""


def label(source: Source, where: str) -> str:
    """The name of a source in messages: key path and origin."""
    return f"{where} ({source.path or source.stage or (source.task.fn if source.task else '')})"


def identity_of(function: Function, bound: Callable[..., Any]) -> Json:
    """JSON that changes when a function does: its name, its arguments, the sha256 of its file."""
    return [function.model_dump(), getattr(bound, "sha256", None)]


def origin(source: Source, stages: Callable[[str], Path], where: str, bind: Bind, base: Path) -> Reading:
    """The rows of `source`, unprocessed.

    Raises:
        RecipeError: not exactly one of path, stage and task is given. DataError: it is missing, or of unknown type.
    """
    given = [name for name in ("path", "stage", "task") if getattr(source, name) is not None]
    if len(given) != 1:
        stated = " and ".join(given) if given else "none"
        raise RecipeError(f"{where}: give exactly one of path, stage, task (given: {stated})")
    if source.task is not None:
        make, name = bind(source.task, TASK, f"{where}.task", base), f"{where}.task: {source.task.fn}"
        own = source.task.model_dump_json() if isinstance(make, Bound) and make.file is None else None
        return _at_hand(lambda: checked_rows(next(each(make, [{}], [name])), name), own)
    if source.stage is not None:
        return _file(stages(source.stage), read_jsonl, _numbered)
    assert source.path is not None
    return _of_path(source.path, source.config, source.split, where, base)


def _of_path(path: str, config: str | None, split: str, where: str, base: Path) -> Reading:
    expanded = Path(path).expanduser()
    found = next((p for p in (expanded, base / expanded) if p.exists()), None)
    if found is None:
        refuse_missing_file(path, where, base)
    if found is None or found.is_dir():
        name = path if found is None else str(found)
        opened = cache(lambda: open_hub(name, config, split, where))
        return _hub(opened) if found is None else _folder(found, [config, split], opened)
    kind = kind_of(found)
    if kind in (".jsonl", ".ndjson") or (kind == ".json" and not is_array(found)):
        return _file(found, read_jsonl, lambda line: f"{path}:{line}")
    if kind == ".json":
        return _file(found, read_array, _numbered)
    if kind in (".csv", ".tsv"):
        separator = "\t" if kind == ".tsv" else ","
        return _file(found, lambda file: read_csv(file, separator), lambda line: f"{path}:{line}")
    if found.suffix == ".parquet":
        return _file(found, read_parquet, _numbered)
    raise DataError(
        f"{where}.path: {path} is none of {', '.join(SUFFIXES)} (all but parquet also as {' or '.join(COMPRESSED)}): "
        "convert it, or give a folder in hub format"
    )


def _file(path: Path, read: Callable[[Path], Iterator[Chunk]], location: Callable[[int], str]) -> Reading:
    return Reading(lambda: read(path), location, lambda: [kind_of(path), path.suffix, _sha256(path)])


def _folder(path: Path, options: Json, opened: Callable[[], Callable[[], Iterator[Chunk]]]) -> Reading:
    """Rows of a folder; its identity is that of its files."""

    def identity() -> Json:
        return [options, {str(file.relative_to(path)): _sha256(file) for file in _files_in(path)}]

    return Reading(lambda: opened()(), _numbered, identity)


def _hub(opened: Callable[[], Callable[[], Iterator[Chunk]]]) -> Reading:
    """Rows of the hub; their identity is a digest of all of them."""
    return Reading(lambda: opened()(), _numbered, lambda: _digest(row for chunk in opened()() for row in chunk.rows))


def _at_hand(make: Callable[[], Sequence[Row]], task: str | None = None) -> Reading:
    """Rows from a function; their identity is a digest of all of them.

    `task` is a function of rlpost with its arguments: it makes the same rows whenever it is called.
    """
    rows = cache(make)

    def identity() -> Json:
        if task is None:
            return _digest(rows())
        if task not in _DIGESTS:
            _DIGESTS[task] = _digest(rows())
        return _DIGESTS[task]

    return Reading(lambda: in_chunks(rows()), _numbered, identity)


def _files_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _digest(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for number, row in enumerate(rows, start=1):
        digest.update(written(row, _numbered(number)) + b"\n")
    return digest.hexdigest()


def _numbered(number: int) -> str:
    return f"row {number}"


def written(row: Mapping[str, Any], location: str) -> bytes:
    """A row as a line for `read_back`; raises DataError if it holds values that cannot be written so."""
    try:
        return json.dumps([wire.encode(row)]).encode("utf-8")
    except wire.CannotCrossError as error:
        raise DataError(f"{location}: it holds {error}, which cannot be kept; make text of it with a `map`") from error


def read_back(line: bytes) -> tuple[Row, bool]:
    """(the row of a line, whether it is a line of the original file rather than one of `written`)."""
    value = json.loads(line)
    return (value, True) if isinstance(value, dict) else (wire.decode(value[0]), False)


def checked_rows(rows: Any, location: str) -> list[Row]:
    """The rows that a function returned; raises DataError if they are not rows."""
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"{location} returned {type(rows).__name__}: return a row (a dict), a list of rows, or None")
    checked = []
    for row in rows:
        if not isinstance(row, dict | Mapping):  # a dict first, which is quick to see
            raise DataError(f"{location} returned a list with {type(row).__name__} in it: rows are dicts")
        checked.append(dict(row))
    return checked
