"""The process that runs a user's functions: a script on a pipe, ended by the parent when a call takes too long.

It speaks lines of JSON: it reads the file's path, replies `up`, runs the file, and lists its functions. A request is a
line that names a function, then a line for each call; each call is answered by a line. It ends when its input does.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import random
import resource
import signal
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from rlpost.usercode import load, wire

_PDEATHSIG = 1


def main() -> None:
    """Answer requests until there are no more."""
    requests, replies = _own_pipes()
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The parent decides; a handler, unlike SIG_IGN, is not inherited by processes of the user's code.
        signal.signal(number, lambda *_: None)
    _leave_memory_to_others()
    hello = json.loads(requests.readline())
    sys.path[:] = hello["path"]
    file = Path(hello["file"])
    _say(replies, {"up": True})
    try:
        module = load.load(file, hello["digest"])
    except BaseException as error:
        _say(replies, {"failed": load.not_loaded(error, file), "trace": "".join(traceback.format_exception(error))})
        return
    functions = load.public_functions(module)
    _say(replies, {"functions": {name: _parameters(function) for name, function in functions.items()}})
    while line := requests.readline():
        _answer(json.loads(line), functions, file, requests, replies)


def _answer(
    request: dict[str, Any], functions: dict[str, Callable[..., Any]], file: Path, requests: BinaryIO, replies: BinaryIO
) -> None:
    """Call one function as often as the request says."""
    function, args = functions[request["call"]], wire.decode(request["args"])
    positional = set(request["positional"])
    for number in range(request["first"], request["first"] + request["calls"]):
        line = requests.readline()
        _seed(zlib.crc32(line, number))
        given = {name: _given(value, request) for name, value in json.loads(line).items()}
        try:
            by_position = [value for name, value in given.items() if name in positional]
            by_name = {name: value for name, value in given.items() if name not in positional}
            found = function(*by_position, **by_name, **args)
            reply = {"v": _returned(found, request["numbers"])}
        except BaseException as error:
            reply = _failed(error, file)
        _say(replies, reply)


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


def _parameters(function: Callable[..., Any]) -> list[list[Any]]:
    """Name, kind, whether there is a default, annotation: of every parameter."""
    found = []
    for p in inspect.signature(function).parameters.values():
        annotation = None
        if p.annotation is not p.empty:
            annotation = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
        found.append([p.name, int(p.kind), p.default is not p.empty, annotation])
    return found


def _seed(seed: int) -> None:
    """Seed all generators, so that the same call draws the same numbers and a resumed run continues bit for bit."""
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed(seed)
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(seed)


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes; the user's code gets an empty stdin, and its prints go to stderr."""
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb", 1 << 16), os.fdopen(replies, "wb", 1 << 16)


def _say(replies: BinaryIO, message: dict[str, Any]) -> None:
    if not getattr(sys.stdout, "closed", True):  # the user's code may replace it
        sys.stdout.flush()
    replies.write(json.dumps(message).encode() + b"\n")
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
