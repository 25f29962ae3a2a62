"""Calls a user's function in its process, once or for a whole batch."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rlpost.usercode import wire
from rlpost.usercode.pipe import Call, Gone, Pipe
from rlpost.usercode.process import UserProcess

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


@dataclass(frozen=True)
class Reply:
    """What came of a call."""

    found: Any
    """What it returned, or a Failed."""
    life: int | None = None
    """Of the process that replied, or was lost: the next one has another number. None where there was none."""

    @property
    def gone(self) -> bool:
        """Whether the process, and what it kept, was lost."""
        return isinstance(self.found, Failed) and self.found.gone


@dataclass(frozen=True)
class Description:
    """What a process says of a function of its file."""

    signature: inspect.Signature
    together: bool = False
    """It is a coroutine function (`async def`), of which many calls may be under way."""


_processes: dict[tuple[int, Path, str], UserProcess] = {}
"""By the process of ours that uses it, the file and its sha256."""
_described: dict[tuple[Path, str], dict[str, Description]] = {}
_schemas: dict[tuple[Any, ...], dict[str, Any]] = {}
"""Of tools: by the file, its sha256, the function and the names of the arguments that a recipe gives."""
_requests = count(1)


def describe(file: Path, digest: str, limit: float) -> dict[str, Description]:
    """The public functions of a user's file (sha256 `digest`), by name; the file runs in its process.

    Raises:
        CallError: it fails to load, ends its process, or takes over `limit` seconds.
    """
    key = (file, digest)
    if key not in _described:
        try:
            reply = _process(key).start(limit)
        except Gone as gone:
            raise CallError(f"{file}: {gone}") from gone
        if "failed" in reply:
            raise CallError(reply["failed"]) from TheirTraceback(reply["trace"])
        _described[key] = {
            name: Description(_signature(said["parameters"]), said["together"])
            for name, said in reply["functions"].items()
        }
    return _described[key]


def in_use() -> bool:
    """Whether functions of users' files may be called in processes."""
    return bool(_processes)


def unneeded(file: Path, digest: str) -> None:
    """End the process of a file whose functions are not called in it; it starts again if one is called."""
    _process((file, digest)).end()


def _process(key: tuple[Path, str]) -> UserProcess:
    ours = (os.getpid(), *key)
    return _processes.get(ours) or _processes.setdefault(ours, UserProcess(*key))


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


def untried(lost: int) -> Reply:
    """Of a call that is not made, after so many in a row lost their process."""
    return Reply(Failed(f"not tried, after {lost} calls in a row lost their process", gone=True))


class Remote:
    """A function of a user's file with its recipe's arguments applied, called in the file's own process.

    `each` returns failures; a single call raises them. All functions of a file share one process and its module's
    globals, which last until the process ends. Any thread may call them.
    """

    def __init__(
        self,
        file: Path,
        digest: str,
        name: str,
        args: Mapping[str, Any],
        described: Description,
        deadline: float = DEADLINE,
        *,
        tool: bool = False,
    ) -> None:
        """Of a function `described` in a file of sha256 `digest`; as a `tool` it takes `arguments`, an object."""
        self._key = (file, digest)
        self._name = self.__name__ = name
        self.__module__ = str(file)
        self._args = dict(args)
        self.deadline = deadline
        self.together = described.together
        """It is a coroutine function: calls made at a time are under way together."""
        left = [p for p in described.signature.parameters.values() if p.name not in args]
        self.__signature__ = described.signature.replace(parameters=left)
        self._positional = [p.name for p in left if p.kind is p.POSITIONAL_ONLY]
        self._tool = tool

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
        asked = [_Asked(call, first + number) for number, call in enumerate(calls)]
        how = _How(read_only, numbers)
        return [reply.found for reply in self._replies(asked, how, keep_going)]

    def seeded(
        self,
        calls: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        lives: Sequence[int | None],
        *,
        keep_going: bool = False,
    ) -> list[Reply]:
        """The replies to calls that draw their random numbers from seeds of their own.

        Args:
            calls: arguments by name.
            seeds: one a call.
            lives: of the process that a call is for, which keeps what it needs; None: of any.
            keep_going: continue after a failure; else the result ends with the first one.

        Raises:
            CallError: as `each`.
        """
        asked = [_Asked(*one) for one in zip(calls, [0] * len(calls), seeds, lives, strict=True)]
        return self._replies(asked, _How(), keep_going)

    def schema(self) -> dict[str, Any]:
        """Of a tool: its JSON schema, as a model is told of it.

        Raises:
            CallError: it cannot be a tool, or its process was lost.
        """
        key = (*self._key, self._name, tuple(sorted(self._args)))
        if key not in _schemas:
            (found,) = self.each([{}])
            if isinstance(found, Failed):
                raise CallError(found.reason) from found.error
            if "unfit" in found:
                raise CallError(found["unfit"])
            _schemas[key] = found["schema"]
        return _schemas[key]

    async def once(self, call: Mapping[str, Any], seed: int, life: int | None) -> Reply | None:
        """The reply to one such call; None if its process was lost before its turn: ask again.

        Coroutines, of any event loops, may wait for many at a time. A call that is cancelled ends there too.

        Raises:
            CallError: as `each`.
        """
        import asyncio

        asked, pipe = _Asked(call, 0, seed, life), self._pipe()
        if asked.lost(pipe):
            return _lost(asked)
        sent: list[Call] = []
        try:
            (one,) = sent = self._send(pipe, [asked], _How())
            return Reply(_result(await asyncio.wrap_future(one.reply)), pipe.life)
        except Gone as gone:
            return Reply(Failed(str(gone), gone=True), pipe.life) if gone.begun else None
        finally:
            pipe.abandon(sent)

    def _replies(self, asked: Sequence[_Asked], how: _How, keep_going: bool) -> list[Reply]:
        found: list[Reply] = []
        lost = 0
        while len(found) < len(asked):
            pipe, left = self._pipe(), asked[len(found) :]
            if left[0].lost(pipe):
                found.append(_lost(left[0]))
            elif lost >= GIVE_UP:
                found += [untried(lost)] * len(left)
            else:
                fit = next((number for number, one in enumerate(left) if one.lost(pipe)), len(left))
                for reply in self._from(pipe, left[:fit], how, keep_going):
                    found.append(reply)
                    lost = lost + 1 if reply.gone else 0
            if found and isinstance(found[-1].found, Failed) and not keep_going:
                return found
        return found

    def _from(self, pipe: Pipe, asked: Sequence[_Asked], how: _How, keep_going: bool) -> list[Reply]:
        """The replies of one process, up to a call that must be asked again."""
        found: list[Reply] = []
        sent: list[Call] = []
        try:
            sent = self._send(pipe, asked, how)
            for one in sent:
                try:
                    found.append(Reply(_result(one.reply.result()), pipe.life))
                except Gone as gone:
                    if not gone.begun:
                        break
                    found.append(Reply(Failed(str(gone), gone=True), pipe.life))
                if isinstance(found[-1].found, Failed) and not keep_going:
                    break
        except Gone:  # it ended before they were sent
            pass
        finally:
            pipe.abandon(sent)
        return found

    def _pipe(self) -> Pipe:
        return _process(self._key).pipe(max(LOADING, self.deadline))

    def _send(self, pipe: Pipe, asked: Sequence[_Asked], how: _How) -> list[Call]:
        number = next(_requests)
        calls = [Call((number, index), self.deadline, self.together) for index in range(len(asked))]
        pipe.send(self._requested(asked, how, number), calls)
        return calls

    def _requested(self, asked: Sequence[_Asked], how: _How, number: int) -> list[bytes]:
        """The lines of a request."""
        try:
            rows = _RowTable()
            lines = [{name: rows.put(name, value) for name, value in one.arguments.items()} for one in asked]
            head = {
                "number": number,
                "call": self._name,
                "args": wire.encode(self._args),
                "tool": self._tool,
                "positional": self._positional,
                "first": asked[0].number,
                "seeds": [one.seed for one in asked if one.seed is not None],
                "calls": len(asked),
                "rows": rows.encoded,
                "read_only": how.read_only,
                "numbers": how.numbers,
            }
            return [json.dumps(line).encode() + b"\n" for line in (head, *lines)]
        except wire.CannotCrossError as error:
            raise CallError(
                f"it is given {error}, which cannot go to its process: take that column out of the data"
            ) from error
        except RecursionError as error:
            raise CallError("it is given a row that is nested too deeply to go to its process") from error


@dataclass(frozen=True)
class _Asked:
    """A call that is to be made."""

    arguments: Mapping[str, Any]
    number: int
    """Its random numbers are made from it and the arguments, if it has no seed."""
    seed: int | None = None
    life: int | None = None
    """Of the process that it is for; None: of any."""

    def lost(self, pipe: Pipe) -> bool:
        """Whether the process that it is for is gone."""
        return self.life not in (None, pipe.life)


@dataclass(frozen=True)
class _How:
    """How arguments are passed and results are returned."""

    read_only: bool = False
    numbers: bool = False


def _lost(asked: _Asked) -> Reply:
    return Reply(Failed("lost its process after its last reply, and what it kept there", gone=True), asked.life)


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


def _result(reply: dict[str, Any]) -> Any:
    if "failed" in reply:
        return Failed(reply["failed"], TheirTraceback(reply["trace"]) if reply["trace"] else None)
    return wire.decode(reply["v"])
