"""Calls a user's function in its process, once or for a whole batch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.usercode import wire
from rlpost.usercode.process import Gone, UserProcess

DEADLINE = 60.0
"""Seconds that a call may take by default."""
LOADING = 120.0
"""Seconds that loading a user's file may take, or its functions' deadline if that is longer."""
GIVE_UP = 8
"""Consecutive calls that lose the process, after which a batch's other calls are not tried."""


class CallError(Exception):
    """A single call failed; its message is the reason, and its cause, if any, the user's traceback."""


class TheirTraceback(Exception):
    """The traceback of an exception in a user's process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failed:
    """A call that failed."""

    reason: str
    """`raised ValueError: no digits at /home/me/my.py:3`, `ran for over 60 s`."""
    error: BaseException | None = None
    """The cause to raise an error from: it holds the user's traceback."""
    gone: bool = False
    """The process has ended, and the function's state with it."""


_processes: dict[tuple[Path, str], UserProcess] = {}
_signatures: dict[tuple[Path, str], dict[str, inspect.Signature]] = {}


def describe(file: Path, digest: str, limit: float) -> dict[str, inspect.Signature]:
    """Signatures of the public functions of a user's file (sha256 `digest`), by name; the file runs in its process.

    Raises:
        CallError: it fails to load, ends its process, or takes over `limit` seconds.
    """
    key = (file, digest)
    if key not in _signatures:
        try:
            reply = _process(key).start(limit)
        except Gone as gone:
            raise CallError(f"{file}: {gone}") from gone
        if "failed" in reply:
            raise CallError(reply["failed"]) from TheirTraceback(reply["trace"])
        _signatures[key] = {name: _signature(parameters) for name, parameters in reply["functions"].items()}
    return _signatures[key]


def in_use() -> bool:
    """Whether functions of users' files may be called in processes."""
    return bool(_processes)


def unneeded(file: Path, digest: str) -> None:
    """End the process of a file whose functions are not called in it; it starts again if one is called."""
    _process((file, digest)).end()


def _process(key: tuple[Path, str]) -> UserProcess:
    return _processes.setdefault(key, UserProcess(*key))


def _signature(parameters: Sequence[Sequence[Any]]) -> inspect.Signature:
    made = []
    for name, kind, has_default, annotation in parameters:
        empty = inspect.Parameter.empty
        default = ... if has_default else empty
        kinds = inspect._ParameterKind(kind)
        made.append(
            inspect.Parameter(name, kinds, default=default, annotation=empty if annotation is None else annotation)
        )
    return inspect.Signature(made)


class Remote:
    """A function of a user's file with its recipe's arguments applied, called in the file's own process.

    `each` returns failures; a single call raises them. All functions of a file share one process and its module's
    globals, which last until the process ends.
    """

    def __init__(
        self,
        file: Path,
        digest: str,
        name: str,
        args: Mapping[str, Any],
        signature: inspect.Signature,
        deadline: float = DEADLINE,
    ) -> None:
        self._key = (file, digest)
        self._name = self.__name__ = name
        self.__module__ = str(file)
        self._args = dict(args)
        self.deadline = deadline
        left = [p for p in signature.parameters.values() if p.name not in args]
        self.__signature__ = signature.replace(parameters=left)
        self._positional = [p.name for p in left if p.kind is p.POSITIONAL_ONLY]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it once.

        Raises:
            CallError: it raised, ended its process, or took over `deadline` seconds.
        """
        (found,) = self.each([self.__signature__.bind_partial(*args, **kwargs).arguments])
        if isinstance(found, Failed):
            raise CallError(found.reason) from found.error
        return found

    def each(
        self,
        calls: Sequence[Mapping[str, Any]],
        *,
        read_only: bool = False,
        numbers: bool = False,
        keep_going: bool = False,
        first: int = 0,
    ) -> list[Any]:
        """What each call returned, or a Failed.

        Args:
            calls: arguments by name.
            read_only: pass rows as read-only mappings; each call gets its own copy either way.
            numbers: results are numbers (or lists of them); anything else comes back as `wire.Odd`.
            keep_going: continue after a failure; else the result ends with the first one.
            first: number of the first call, where these are some of many: a call's random numbers depend on its own.

        Raises:
            CallError: an argument cannot be sent to another process.
        """
        found: list[Any] = []
        lost = 0
        while len(found) < len(calls):
            try:
                request = self._requested(calls[len(found) :], read_only, numbers, first + len(found))
                for reply in self._ask(request, len(calls) - len(found)):
                    found.append(_result(reply))
                    lost = 0
                    if isinstance(found[-1], Failed) and not keep_going:
                        return found
            except Gone as gone:
                lost += 1
                found.append(Failed(str(gone), gone=True))
                if lost >= GIVE_UP:
                    missing = len(calls) - len(found)
                    found += [Failed(f"not tried, after {lost} calls in a row lost their process", gone=True)] * missing
                if not keep_going:
                    return found
        return found

    def _ask(self, request: bytes, replies: int) -> Iterator[dict[str, Any]]:
        process = _process(self._key)
        if not process.running:
            reply = process.start(max(LOADING, self.deadline))
            if "failed" in reply:
                raise Gone(f"ended its process, and its file no longer loads ({reply['failed']})")
        return process.ask(request, replies, self.deadline)

    def _requested(self, calls: Sequence[Mapping[str, Any]], read_only: bool, numbers: bool, first: int) -> bytes:
        try:
            return self._request(calls, read_only, numbers, first)
        except wire.CannotCrossError as error:
            raise CallError(
                f"it is given {error}, which cannot go to its process: take that column out of the data"
            ) from error
        except RecursionError as error:
            raise CallError("it is given a row that is nested too deeply to go to its process") from error

    def _request(self, calls: Sequence[Mapping[str, Any]], read_only: bool, numbers: bool, first: int) -> bytes:
        rows = _RowTable()
        lines = [{name: rows.put(name, value) for name, value in call.items()} for call in calls]
        head = {
            "call": self._name,
            "args": wire.encode(self._args),
            "positional": self._positional,
            "first": first,
            "calls": len(calls),
            "rows": rows.encoded,
            "read_only": read_only,
            "numbers": numbers,
        }
        return b"".join(json.dumps(line).encode() + b"\n" for line in (head, *lines))


class _RowTable:
    """The rows of a request, each encoded once even if several calls take it."""

    def __init__(self) -> None:
        self.encoded: list[Any] = []
        self._index_of: dict[int, int] = {}

    def put(self, name: str, value: Any) -> Any:
        """An argument as it is encoded in its call's line."""
        if isinstance(value, Mapping):
            return {"row": self._row(name, value)}
        if type(value) is list and value and all(isinstance(item, Mapping) for item in value):
            return {"each": [{"row": self._row(f"{name}[{i}]", item)} for i, item in enumerate(value)]}
        return {"value": wire.encode(value, name)}

    def _row(self, name: str, row: Mapping[str, Any]) -> int:
        if id(row) not in self._index_of:
            self._index_of[id(row)] = len(self.encoded)
            self.encoded.append(wire.encode(row, name))
        return self._index_of[id(row)]


def _result(reply: Mapping[str, Any]) -> Any:
    if "failed" in reply:
        return Failed(reply["failed"], TheirTraceback(reply["trace"]) if reply["trace"] else None)
    return wire.decode(reply["v"])
