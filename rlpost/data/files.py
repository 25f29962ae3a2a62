"""Reads rows from one file, in chunks."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.data.compressed import open_bytes
from rlpost.data.messages import without_nulls
from rlpost.errors import DataError

AT_ONCE = 8192
"""Rows of a chunk."""
BYTES_AT_ONCE = 1 << 22
"""Bytes of a chunk's lines at most, so that chunks of long rows are shorter."""
_TYPES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows."""

    rows: list[dict[str, Any]]
    numbers: list[int]
    """The number of each row, from 1: its line, or its index among the rows."""
    lines: Sequence[bytes] | None = None
    """The rows' lines in the file, if the rows are unchanged."""


def read_jsonl(path: Path) -> Iterator[Chunk]:
    """The rows of a JSON-lines file in UTF-8, compressed or not; a byte-order mark is skipped, so are blank lines.

    Raises:
        DataError: `file:line: reason`.
    """
    lines: list[bytes] = []
    numbers: list[int] = []
    size, first = 0, True
    with open_bytes(path) as file:
        # Only "\n" ends a line: JSON may hold other line separators inside strings.
        for number, line in enumerate(file, start=1):
            line = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).removesuffix(b"\n")
            if not line.strip():
                continue
            lines.append(line)
            numbers.append(number)
            size += len(line)
            if len(lines) == AT_ONCE or size > BYTES_AT_ONCE:
                yield _parsed(lines, numbers, path, first)
                first = False
                lines, numbers, size = [], [], 0
    if lines:
        yield _parsed(lines, numbers, path, first)


def _parsed(lines: list[bytes], numbers: list[int], path: Path, first: bool) -> Chunk:
    if first:
        _refuse_repeated_keys(lines[0], f"{path}:{numbers[0]}")
    rows = _plainly(lines)
    if rows is None:  # one is malformed, or needs the slow path
        rows = [_row(line, f"{path}:{n}") for n, line in zip(numbers, lines, strict=True)]
    return Chunk(rows, numbers, lines)


def _refuse_repeated_keys(line: bytes, location: str) -> None:
    """Refuse a row that has a column twice, of which the parser would keep the last; the first row tells of all."""

    def keys(pairs: list[tuple[str, Any]]) -> None:
        _refuse_repeated([key for key, _ in pairs], location)

    with contextlib.suppress(ValueError, RecursionError):  # reported where rows are parsed
        json.loads(line, object_pairs_hook=keys)


def _plainly(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """The rows, if every line is plainly one JSON object; None if one is not, or may not be."""
    if any(b"\\u" in line and b"\\ud" in line.lower() for line in lines):
        return None
    read = json.JSONDecoder().raw_decode
    rows = []
    try:
        for line in lines:
            text = line.decode().strip(" \t\r")
            row, end = read(text)
            if end != len(text) or type(row) is not dict:
                return None
            rows.append(row)
    except (ValueError, RecursionError):
        return None
    return rows


def _row(line: bytes, location: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(
            f"{location}: not UTF-8 (byte 0x{byte:02x} at column {error.start + 1}): "
            "save the file as UTF-8 (from latin-1: iconv -f latin-1 -t utf-8)"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{location}: not JSON: {error.msg} at column {error.colno}: one object a line") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not usable JSON: {error}") from error
    if not isinstance(row, dict):
        kind = _TYPES.get(type(row), "null")
        raise DataError(f"{location}: a row must be an object with columns, this is {kind}")
    if b"\\ud" in line.lower():
        refuse_lone_surrogates(row, location)
    return row


def refuse_lone_surrogates(row: dict[str, Any], location: str) -> None:
    """Refuse lone surrogates (`\\ud83d` alone), which JSON can spell but no tokenizer can read."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{location}: half a character (a lone surrogate \\ud...): write it in full") from error


def read_parquet(path: Path) -> Iterator[Chunk]:
    """The rows of a parquet file; in messages and tools, nulls are left out.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    first = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(AT_ONCE):
                found = batch.to_pylist(maps_as_pydicts="strict")
                rows = [{k: without_nulls(v) for k, v in row.items()} for row in found]
                yield Chunk(rows, list(range(first, first + len(rows))))
                first += len(rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error
    except KeyError as error:
        raise DataError(f"{path}: a map among the rows from row {first} on has a key twice: {error}") from error


def _refuse_repeated(columns: Sequence[str], location: str) -> None:
    twice = [column for column, times in Counter(columns).items() if times > 1]
    if twice:
        raise DataError(f"{location}: it has the column {twice[0]!r} more than once: remove all but one")


def in_chunks(rows: Sequence[dict[str, Any]]) -> Iterator[Chunk]:
    """Rows in memory, in chunks, numbered from 1."""
    for first in range(0, len(rows), AT_ONCE):
        some = list(rows[first : first + AT_ONCE])
        yield Chunk(some, list(range(first + 1, first + 1 + len(some))))
