"""Reads rows from csv files and JSON arrays, in chunks."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rlpost.data.compressed import open_bytes
from rlpost.data.files import AT_ONCE, BYTES_AT_ONCE, Chunk, refuse_lone_surrogates
from rlpost.data.turns import quoted_messages
from rlpost.errors import DataError

_LARGEST_CELL = 1 << 27
_READ = 1 << 20
_INK = re.compile(r"[^ \t\r\n]")
_SEPARATORS = ",;\t|"
_MESSAGE_CELLS = ("prompt", "completion", "chosen", "rejected", "reference")
"""Columns that hold texts or messages: a cell of them that is the JSON of messages is read as such."""
_JSON_CELLS = ("messages", "conversations", "conversation", "completions", "scores", "steps", "labels", "history")
"""Columns that hold lists: a cell of them that begins with a bracket is read as JSON."""

Row = dict[str, Any]


def read_csv(path: Path, separator: str = ",") -> Iterator[Chunk]:
    """The rows of a csv file in UTF-8 with a header; cells are texts, and lists are JSON.

    Raises:
        DataError: `file:line: reason`.
    """
    csv.field_size_limit(_LARGEST_CELL)
    rows: list[Row] = []
    numbers: list[int] = []
    size = 0
    with open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=separator, strict=True)
        header: list[str] | None = None
        before = 0
        try:
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not cells:
                    continue
                if header is None:
                    header = _checked_header(cells, separator, f"{path}:{line}")
                    continue
                rows.append(_row(header, cells, f"{path}:{line}"))
                numbers.append(line)
                size += sum(map(len, cells))
                if len(rows) == AT_ONCE or size > BYTES_AT_ONCE:
                    yield Chunk(rows, numbers)
                    rows, numbers, size = [], [], 0
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{before + 1}: not UTF-8 from here on: save the file as UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{path}:{before + 1}: not csv: {error}") from error
    if rows:
        yield Chunk(rows, numbers)


def _checked_header(cells: list[str], separator: str, location: str) -> list[str]:
    if len(cells) == 1 and (other := [s for s in _SEPARATORS if s != separator and s in cells[0]]):
        raise DataError(
            f"{location}: the header {cells[0]!r:.60} is one column: its separator may be {other[0]!r}; "
            "separate a .csv with commas, a .tsv with tabs"
        )
    if not all(cells) or len(set(cells)) < len(cells):
        raise DataError(f"{location}: the header {', '.join(cells)!r:.80} needs a name of its own for each column")
    return cells


def _row(header: list[str], cells: list[str], location: str) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{location}: {len(cells)} cells, but the header has {len(header)}: quote cells that hold the separator"
        )
    if any("\0" in cell for cell in cells):
        raise DataError(f"{location}: a NUL byte, which is no text: save the file as UTF-8")
    row: Row = dict(zip(header, cells, strict=True))
    for column in _JSON_CELLS:
        if column in row and row[column].lstrip().startswith("["):
            try:
                row[column] = json.loads(row[column])
            except (ValueError, RecursionError) as error:
                raise DataError(f"{location}: {column!r} is not JSON ({error})") from error
    for column in _MESSAGE_CELLS:
        if column in row and (messages := quoted_messages(row[column])) is not None:
            row[column] = messages
    return row


def is_array(path: Path) -> bool:
    """Whether a JSON file begins with a bracket; otherwise it has one object a line.

    Raises:
        DataError: it cannot be read.
    """
    with open_bytes(path) as file:
        head = file.read(_READ)
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def read_array(path: Path) -> Iterator[Chunk]:
    """The rows of a JSON file that is one array of objects; it is parsed as it is read.

    Raises:
        DataError: `file: row N: reason`.
    """
    rows: list[Row] = []
    first, size = 1, 0
    for row, length in _objects(path):
        rows.append(row)
        size += length
        if len(rows) == AT_ONCE or size > BYTES_AT_ONCE:
            yield Chunk(rows, list(range(first, first + len(rows))))
            first += len(rows)
            rows, size = [], 0
    if rows:
        yield Chunk(rows, list(range(first, first + len(rows))))


def _objects(path: Path) -> Iterator[tuple[Row, int]]:
    """The objects of an array, and the length of each in characters."""
    with open_bytes(path) as file:
        text = _Text(file, path)
        text.skip("[", f"{path}: not JSON: it does not begin with '['")
        number = 0
        while text.following() != "]":
            number += 1
            where = f"{path}: row {number}"
            if number > 1:
                text.skip(",", f"{where}: not JSON: expected ',' or ']' before it")
            row, source = text.value(where)
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row must be an object with columns, this is {type(row).__name__}")
            if "\\ud" in source.lower():
                refuse_lone_surrogates(row, where)
            yield row, len(source)
        text.skip("]", f"{path}: not JSON")
        if text.following():
            raise DataError(f"{path}: not JSON: text after the array: give one array, or one object a line")


class _Text:
    """A window on the text of a JSON file, and a position in it."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False

    def following(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            found = _INK.search(self._text, self._at)
            if found:
                self._at = found.start()
                return found[0]
            self._at = len(self._text)
            if self._ended:
                return ""
            self._more(_READ)

    def skip(self, character: str, otherwise: str) -> None:
        """Step over a character; raises DataError if another comes."""
        if self.following() != character:
            raise DataError(otherwise)
        self._at += 1

    def value(self, where: str) -> tuple[Any, str]:
        """The next value, and its text."""
        self.following()
        size = _READ
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise DataError(f"{where}: not JSON: {error.msg}") from error
                self._more(size)
                size *= 2  # so that a long value is not parsed again and again
                continue
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not usable JSON: {error}") from error
            source, self._at = self._text[self._at : end], end
            return found, source

    def _more(self, size: int) -> None:
        data = self._file.read(size)
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decoder.decode(data, self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8: save the file as UTF-8") from error
        self._at = 0
