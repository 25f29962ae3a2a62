"""Encoded rows as flat arrays: in memory, or in a folder whose files are memory-mapped.

A row is a line of JSON and, if its group is kept too, pieces of tokens: its prompt, then its completions. `X_ends`
holds the ends of the pieces of X. Fields that no row has have no array: without `action`, all tokens of completions are
actions.

Axes: R rows, P pieces, C completions, T tokens.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rlpost.data.batch import Pieces, concatenated
from rlpost.types import Completion, Group

Json = Any
Array = NDArray[Any]
ABOUT = "about.json"
_LARGE = 1 << 32
"""Ends below this are stored in four bytes."""
_PIECES = {
    "text": np.uint8,
    "finish": np.uint8,
    "logprobs": np.float64,
    "steps": np.int32,
    "step_labels": np.float64,
    "step_rewards": np.float64,
}
"""Arrays that completions may have, with their types; text is UTF-8."""
_NUMBERS = ("reward", "label", "score")
"""Numbers that a completion may have, NaN where it has none."""


@dataclass
class Block:
    """Some encoded rows, to be added to the arrays."""

    lines: Sequence[bytes]
    """[R] each row as JSON."""
    numbers: Sequence[int]
    """[R] number of each row in its source."""
    pieces_R: Array
    """Pieces of each row's group; 0 where only the row is kept."""
    ids: Pieces
    """[P] pieces of [T] ids."""
    action_T: Array | None = None
    """False where a token is not an action; arbitrary on prompts."""
    own: Mapping[str, Pieces] = field(default_factory=dict)
    """Names of `_PIECES` -> [C] pieces."""
    values: Mapping[str, Array] = field(default_factory=dict)
    """Names of `_NUMBERS` -> [C]."""


def block_of(groups: Sequence[Group], lines: Sequence[bytes], numbers: Sequence[int]) -> Block:
    """A block of groups, the row of each as JSON, and their numbers."""
    pieces = [ids for g in groups for ids in (g.prompt, *(c.ids for c in g.completions))]
    flags = [f for g in groups for f in (np.ones(len(g.prompt), np.bool_), *(c.action for c in g.completions))]
    action_T = np.concatenate(flags) if flags else np.ones(0, np.bool_)
    everyone = [c for g in groups for c in g.completions]
    own = {}
    for name, kind in _PIECES.items():
        found = [getattr(c, name) for c in everyone]
        if any(len(x) for x in found):
            own[name] = texts(found) if kind is np.uint8 else concatenated([x.tolist() for x in found], kind)
    values = {}
    for name in _NUMBERS:
        given = [getattr(c, name) for c in everyone]
        if any(x is not None for x in given):
            values[name] = np.array([np.nan if x is None else float(x) for x in given])
    counts = np.fromiter((1 + len(g.completions) for g in groups), np.int64, len(groups))
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    return Block(lines, numbers, counts, Pieces(ids, lengths), None if action_T.all() else action_T, own, values)


def texts(given: Sequence[str]) -> Pieces:
    """Texts as pieces of UTF-8."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in given]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return Pieces(np.frombuffer(b"".join(encoded), np.uint8), lengths)


class Writer:
    """Appends blocks to arrays, in a folder or in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._kinds: dict[str, np.dtype[Any]] = {}
        self._totals: dict[str, int] = {}
        self._completions = 0
        self._tokens = 0
        self._longest = 0
        self._digest = hashlib.sha256()

    def add(self, block: Block) -> None:
        """Add rows."""
        line = b"\n".join([*block.lines, b""])
        self._digest.update(line)
        self._extend("rows", np.frombuffer(line, np.uint8))
        self._extend_ends("rows", np.fromiter(map(len, block.lines), np.int64, len(block.lines)) + 1)
        self._extend("numbers", np.asarray(block.numbers, np.int64), narrow=True)
        if not block.pieces_R.any():
            return
        self._extend_ends("groups", block.pieces_R)
        self._extend("ids", block.ids.flat_T.astype(np.int32, copy=False))
        self._extend_ends("ids", block.ids.lengths_U)
        count = len(block.ids.lengths_U) - len(block.pieces_R)
        if block.action_T is not None or "action" in self._files:
            self._fill("action", np.ones(self._tokens, np.bool_))
            given = block.action_T
            self._extend("action", np.ones(len(block.ids.flat_T), np.bool_) if given is None else given)
        for name, kind in _PIECES.items():
            if name in block.own or f"{name}_ends" in self._files:
                given_pieces = block.own.get(name) or Pieces(np.zeros(0, kind), np.zeros(count, np.int64))
                if f"{name}_ends" not in self._files:
                    self._extend_ends(name, np.zeros(self._completions, np.int64))
                self._extend(name, given_pieces.flat_T.astype(kind, copy=False))
                self._extend_ends(name, given_pieces.lengths_U)
        for name in _NUMBERS:
            if name in block.values or name in self._files:
                self._fill(name, np.full(self._completions, np.nan))
                self._extend(name, block.values.get(name, np.full(count, np.nan)))
        self._completions += count
        self._tokens += len(block.ids.flat_T)
        self._longest = max(self._longest, int(block.ids.lengths_U.max()))

    def finish(self, about: Mapping[str, Json]) -> None:
        """Write `about`, with the digest of the rows' lines and the length of the longest piece."""
        full = {**about, "rows": self._digest.hexdigest(), "longest": self._longest}
        self._extend(ABOUT, np.frombuffer(json.dumps(full).encode(), np.uint8))
        for file in self._files.values():
            file.flush()

    def close(self) -> None:
        """Close the files of the folder."""
        if self._folder is not None:
            for file in self._files.values():
                file.close()

    def arrays(self) -> dict[str, Array]:
        """The arrays in memory."""
        buffers = {name: file.getbuffer() for name, file in self._files.items() if isinstance(file, io.BytesIO)}
        return {name: _read_only(np.frombuffer(data, self._kinds[name])) for name, data in buffers.items()}

    def _fill(self, name: str, values: Array) -> None:
        """Start an array with the values of the rows before, if there is none yet."""
        if name not in self._files:
            self._extend(name, values)

    def _extend_ends(self, name: str, lengths: Array) -> None:
        total = self._totals.get(name, 0)
        ends = total + np.cumsum(lengths)
        self._totals[name] = int(ends[-1]) if len(ends) else total
        self._extend(f"{name}_ends", ends, narrow=True)

    def _extend(self, name: str, values: Array, narrow: bool = False) -> None:
        """Append; `narrow` integers are stored in four bytes until one does not fit."""
        if narrow and (len(values) == 0 or values.max() < _LARGE) and self._kinds.get(name, np.uint32) == np.uint32:
            values = values.astype(np.uint32)
        if name not in self._files:
            self._open(name, values.dtype)
        elif values.dtype != self._kinds[name]:
            self._widen(name)
        self._files[name].write(values.tobytes())

    def _open(self, name: str, kind: np.dtype[Any]) -> None:
        self._kinds[name] = kind
        file_name = name if name == ABOUT else f"{name}.{kind.name}"
        self._files[name] = io.BytesIO() if self._folder is None else (self._folder / file_name).open("w+b")

    def _widen(self, name: str) -> None:
        """Convert an array of four-byte integers to eight bytes."""
        file = self._files[name]
        file.seek(0)
        before = np.frombuffer(file.read(), np.uint32).astype(np.int64)
        file.close()
        if self._folder is not None:
            (self._folder / f"{name}.{np.dtype(np.uint32).name}").unlink()
        self._open(name, before.dtype)
        self._files[name].write(before.tobytes())


class Flat:
    """Encoded rows as groups, which are views of the arrays."""

    def __init__(self, arrays: Mapping[str, Array], read: Callable[[bytes], dict[str, Any]]) -> None:
        """Wrap the arrays of a `Writer`; `read` parses a row's line."""
        self._arrays = arrays
        self._read = read
        self.about: dict[str, Json] = json.loads(arrays[ABOUT].tobytes())
        self._all_actions = _read_only(np.ones(self.about["longest"], np.bool_))

    @classmethod
    def mapped(cls, folder: Path, read: Callable[[bytes], dict[str, Any]]) -> Flat:
        """Memory-map the folder of a `Writer`. Raises OSError."""
        arrays = {}
        for file in folder.iterdir():
            name, _, kind = file.name.partition(".")
            if file.name == ABOUT:
                arrays[ABOUT] = np.frombuffer(file.read_bytes(), np.uint8)
            elif kind in _KINDS and file.stat().st_size:
                arrays[name] = np.memmap(file, kind, "r").view(np.ndarray)
            elif kind in _KINDS:
                arrays[name] = _read_only(np.zeros(0, kind))
        return cls(arrays, read)

    def __len__(self) -> int:
        return len(self._arrays["rows_ends"])

    def row(self, i: int) -> dict[str, Any]:
        """A row, read again from its line."""
        return self._read(self._piece("rows", i).tobytes())

    def number(self, i: int) -> int:
        """Where a row comes from."""
        return int(self._arrays["numbers"][i])

    def group(self, i: int) -> Group:
        """A row's group; its example is the row."""
        ends = self._arrays["groups_ends"]
        first, last = int(ends[i - 1]) if i else 0, int(ends[i])
        return Group(
            self._piece("ids", first),
            [self._completion(piece, piece - i - 1) for piece in range(first + 1, last)],
            self.row(i),
        )

    def _completion(self, piece: int, number: int) -> Completion:
        ids = self._piece("ids", piece)
        action = self._all_actions[: len(ids)]
        if "action" in self._arrays:
            begin, end = self._bounds("ids", piece)
            action = self._arrays["action"][begin:end]
        own: dict[str, Any] = {}
        for name, kind in _PIECES.items():
            if name in self._arrays:
                found = self._piece(name, number)
                own[name] = found.tobytes().decode("utf-8", "surrogatepass") if kind is np.uint8 else found
        for name in _NUMBERS:
            if name in self._arrays and not np.isnan(value := self._arrays[name][number]):
                own[name] = bool(value) if name == "label" else float(value)
        return Completion(ids, action, **own)

    def _bounds(self, name: str, i: int) -> tuple[int, int]:
        ends = self._arrays[f"{name}_ends"]
        return int(ends[i - 1]) if i else 0, int(ends[i])

    def _piece(self, name: str, i: int) -> Array:
        begin, end = self._bounds(name, i)
        return self._arrays[name][begin:end]


_KINDS = {np.dtype(kind).name for kind in (*_PIECES.values(), np.bool_, np.uint32, np.int64)}


def _read_only(array: Array) -> Array:
    array.setflags(write=False)
    return array
