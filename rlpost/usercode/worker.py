"""The process that runs a user's functions: a script on a pipe, ended by the parent when a call takes too long.

It speaks lines of JSON: it reads the file's path, replies `up`, runs the file, and lists its functions. A request is a
line that names a function, then a line for each call; each call is answered by a line that says which it is `of`. It
ends when its input does.

Plain functions are called one at a time, in the order asked, outside any event loop: they may run their own. Coroutine
functions run in one loop, all together; a plain call stops the loop while it is at work. A line `cancel` ends one.
"""

from __future__ import annotations

import ctypes
import inspect
import io
import json
import os
import resource
import signal
import sys
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from rlpost.usercode import load, tools, wire
from rlpost.usercode.seeding import seed_all

_PDEATHSIG = 1


def main() -> None:
    """Answer requests until there are no more."""
    requests, replies = _own_pipes()
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The parent decides; a handler, unlike SIG_IGN, is not inherited by processes of the user's code.
        signal.signal(number, lambda *_: None)
    _leave_memory_to_others()
    hello = json.loads(requests.readline())  # byte by byte: what follows is for whoever reads on
    sys.path[:] = hello["path"]
    file = Path(hello["file"])
    _say(replies, 0, {"up": True})
    try:
        module = load.load(file, hello["digest"])
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        _say(replies, 1, {"failed": load.not_loaded(error, file), "trace": trace})
        return
    functions = load.public_functions(module)
    _say(replies, 1, {"functions": {name: _described(function) for name, function in functions.items()}})
    calls = Calls(functions, file, replies)
    if any(map(inspect.iscoroutinefunction, functions.values())):
        from rlpost.usercode.coroutines import Loop  # asyncio takes as long as the rest of this process's start

        Loop(calls, requests.fileno()).serve()
        return
    lines = io.BufferedReader(requests, 1 << 16)
    while line := lines.readline():
        calls.take(line)
        while calls.plain:
            calls.answer(calls.plain.popleft())


@dataclass
class OneCall:
    """One call of a request."""

    request: dict[str, Any]
    index: int
    line: bytes
    """Its arguments, encoded."""


class Calls:
    """What is asked, line by line, and how it is answered."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], file: Path, replies: BinaryIO) -> None:
        self.plain: deque[OneCall] = deque()
        """Calls of plain functions, in the order asked."""
        self.coroutines: deque[OneCall] = deque()
        self.cancelled: deque[tuple[int, int]] = deque()
        """Numbers of calls of coroutine functions that are to end."""
        self._functions = functions
        self._file = file
        self._replies = replies
        self._request: dict[str, Any] = {"calls": 0}
        self._read = 0

    def take(self, line: bytes) -> None:
        """Take a line."""
        if self._read < self._request["calls"]:
            together = inspect.iscoroutinefunction(self._functions[self._request["call"]])
            (self.coroutines if together else self.plain).append(OneCall(self._request, self._read, line))
            self._read += 1
        elif "cancel" in (asked := json.loads(line)):
            self.cancelled.append(tuple(asked["cancel"]))
        else:
            self._request, self._read = {**asked, "args": wire.decode(asked["args"])}, 0

    def answer(self, call: OneCall) -> None:
        """Call a plain function."""
        try:
            reply = self._returned(call, self._called(call))
        except BaseException as error:
            reply = _failed(error, self._file)
        self.reply(call, reply)

    async def answered(self, call: OneCall) -> dict[str, Any]:
        """The reply to a call of a coroutine function."""
        try:
            found = self._called(call)
            return self._returned(call, await found if inspect.isawaitable(found) else found)
        except GeneratorExit:  # the loop is gone
            raise
        except BaseException as error:
            return _failed(error, self._file)

    def reply(self, call: OneCall, reply: dict[str, Any]) -> None:
        """Say what became of a call."""
        _say(self._replies, call.index, reply, call.request["number"])

    def _called(self, call: OneCall) -> Any:
        """What the function returns, or its coroutine, which then begins at once."""
        request, number = call.request, call.request["first"] + call.index
        seed_all(request["seeds"][call.index] if request["seeds"] else zlib.crc32(call.line, number))
        function = self._functions[request["call"]]
        given = {name: _given(value, request) for name, value in json.loads(call.line).items()}
        if request["tool"]:
            return _as_tool(function, given.get("arguments"), request["args"])
        positional = set(request["positional"])
        by_position = [value for name, value in given.items() if name in positional]
        by_name = {name: value for name, value in given.items() if name not in positional}
        return function(*by_position, **by_name, **request["args"])

    def _returned(self, call: OneCall, found: Any) -> dict[str, Any]:
        return {"v": _returned(found, call.request["numbers"])}


def _as_tool(function: Callable[..., Any], arguments: Mapping[str, Any] | None, args: Mapping[str, Any]) -> Any:
    """What came of a call as a tool; without arguments, the tool's schema or why it has none."""
    if arguments is not None:
        return tools.call(function, arguments, args)
    try:
        return {"schema": tools.schema(function, args)}
    except tools.UnfitError as error:
        return {"unfit": str(error)}


def _given(value: Any, request: dict[str, Any]) -> Any:
    """An argument; a row of the request is a fresh copy for each call."""
    if type(value) is dict and "row" in value and "$" not in value:
        row = wire.decode(request["rows"][value["row"]])
        return MappingProxyType(row) if request["read_only"] else row
    if type(value) is dict and "each" in value and "$" not in value:
        return [_given(item, request) for item in value["each"]]
    return wire.decode(value["value"])


def _returned(found: Any, numbers: bool) -> Any:
    """The result, encoded; with `numbers`, any real number becomes a float, also in lists."""
    if numbers and isinstance(found, list | tuple):
        return [_returned(item, numbers) for item in found]
    if numbers and isinstance(found, Real) and not isinstance(found, int):
        return float(found)
    if not numbers and isinstance(found, Iterator):
        found = list(found)
    try:
        return wire.encode(found)
    except wire.CannotCrossError:
        if numbers:
            return {"$": "odd", "v": f"a {type(found).__name__} ({_clip(repr(found))})"}
        raise


def _failed(error: BaseException, file: Path) -> dict[str, str]:
    if isinstance(error, wire.CannotCrossError):
        return {"failed": f"returned {error}, which cannot leave its process: return plain values", "trace": ""}
    return {"failed": load.raised(error, file), "trace": "".join(traceback.format_exception(error))}


def _clip(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _described(function: Callable[..., Any]) -> dict[str, Any]:
    """Name, kind, whether there is a default, annotation: of all parameters; and whether it is a coroutine function."""
    found = []
    for p in inspect.signature(function).parameters.values():
        annotation = None
        if p.annotation is not p.empty:
            annotation = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
        found.append([p.name, int(p.kind), p.default is not p.empty, annotation])
    return {"parameters": found, "together": inspect.iscoroutinefunction(function)}


def _own_pipes() -> tuple[io.FileIO, BinaryIO]:
    """The two pipes; the user's code gets an empty stdin, and its prints go to stderr."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return io.FileIO(requests), os.fdopen(replies, "wb", 1 << 16)


def _say(replies: BinaryIO, index: int, message: dict[str, Any], request: int = 0) -> None:
    """Write a reply to one call of a request, or (0) to the first line."""
    if not getattr(sys.stdout, "closed", True):  # the user's code may replace it
        sys.stdout.flush()
    replies.write(json.dumps({"of": [request, index], **message}).encode() + b"\n")
    replies.flush()


def _die_with_parent() -> None:
    """Let Linux end this process when the parent ends, even inside C."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            sys.exit()


def _leave_memory_to_others() -> None:
    """Limit this process to the free memory, and let it be killed before the trainer if memory runs out."""
    if sys.platform != "linux":
        return
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
        entries = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = sum(int(entries[key].split()[0]) for key in ("MemAvailable", "SwapFree")) << 10
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (free if hard < 0 else min(free, hard), hard))
    except (OSError, KeyError, ValueError):  # a container may hide or forbid any of it
        return


if __name__ == "__main__":
    main()
