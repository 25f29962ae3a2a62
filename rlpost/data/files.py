"""Rows from one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlpost.data.messages import without_nulls
from rlpost.errors import DataError

_TYPES = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a JSON-lines file in UTF-8 (a byte-order mark is skipped, so are blank lines), and their lines.

    Raises:
        DataError: `file:line: reason`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    # Only "\n" ends a line: JSON may hold other line separators inside strings.
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    return [_row(line, f"{path}:{n}") for n, line in lines], [n for n, _ in lines]


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
        row = json.loads(text)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(
            f"{place}: not UTF-8 (byte 0x{byte:02x} at column {error.start + 1}): "
            "save the file as UTF-8 (from latin-1: iconv -f latin-1 -t utf-8)"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}: one object a line") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not usable JSON: {error}") from error
    if not isinstance(row, dict):
        kind = _TYPES.get(type(row), "null")
        raise DataError(f"{place}: a row must be an object with columns, this is {kind}")
    if b"\\ud" in line.lower():
        _refuse_lone_surrogates(row, place)
    return row


def _refuse_lone_surrogates(row: dict[str, Any], place: str) -> None:
    """JSON can spell half a character (`\\ud83d` alone), which no tokenizer can read."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: half a character (a lone surrogate \\ud...): write it in full") from error


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file; in messages and tools, what is null is absent.

    Raises:
        DataError: it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error
    return [{k: without_nulls(v) for k, v in row.items()} for row in rows]
