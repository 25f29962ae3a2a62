"""Which levels hold on this machine, found out by a program that tries to get out of each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlpost.errors import RecipeError
from rlpost.sandbox.outcome import Level, Limits, limits_of
from rlpost.sandbox.process import Broken, execute
from rlpost.suggest import hint_or_list

_PROBE = """
import json, os, socket, sys

def get_out(path, process):
    yield "read a file", lambda: open(path).read()
    yield "wrote a file", lambda: open(path, "a")
    yield "emptied a file", lambda: os.open(path, os.O_RDONLY | os.O_TRUNC)
    yield "changed a file's rights", lambda: os.chmod(path, 0o600)
    yield "listed the root", lambda: os.listdir("/")
    yield "reached a process", lambda: os.kill(process, 0)
    yield "opened a socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    yield "opened a local socket", lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    yield "started a process", lambda: os.fork() or os._exit(0)

got_out = []
for what, attempt in get_out(*json.load(sys.stdin)):
    try:
        attempt()
    except OSError:
        continue
    got_out.append(what)
print(json.dumps(got_out))
"""


@cache
def why_not(level: Level) -> str:
    """What is missing for a level on this machine, in words; empty if it holds. Looked at once a process."""
    with tempfile.TemporaryDirectory(prefix="rlpost-") as folder:
        outside = Path(folder) / "outside"
        outside.write_text("not for programs")
        try:
            outcome = execute(_PROBE, json.dumps([str(outside), os.getpid()]), Limits(), level)
        except Broken as error:
            return str(error)
    if not outcome.succeeded:
        last = outcome.stderr.strip().rpartition("\n")[2]
        return f"Python does not run in it: {outcome.reason} {outcome.code}{f', {last}' if last else ''}"
    got_out = json.loads(outcome.stdout)
    return f"it does not hold: a program {', '.join(got_out)}" if got_out and level is not Level.rlimits else ""


def choose(level: str | None = None) -> Level:
    """The level that was asked for, or the strongest that holds here; never `rlimits` unless it was asked for.

    Raises:
        RecipeError: there is no such level, it does not hold here, or none does.
    """
    if level is not None:
        if level not in list(Level):
            raise RecipeError(
                f"sandbox: no level {level!r}{hint_or_list(level, [str(each) for each in Level], 'there are')}"
            )
        if reason := why_not(Level(level)):
            raise RecipeError(f"sandbox: level {level} is not to be had here: {reason}; `rlpost doctor` says which are")
        return Level(level)
    for held in (Level.namespaces, Level.landlock):
        if not why_not(held):
            return held
    reasons = "; ".join(f"{held}: {why_not(held)}" for held in (Level.namespaces, Level.landlock))
    raise RecipeError(
        f"sandbox: none holds on this machine ({reasons}); run programs elsewhere, or set level: rlimits, with which "
        "they may do all that you may"
    )


def checked(args: Mapping[str, Any], where: str) -> tuple[Limits, Level]:
    """What programs may use and what holds them, by the arguments of a recipe's function at key path `where`.

    Raises:
        RecipeError: `deadline` or `memory` is wrong, or no sandbox holds here as `level` asks for.
    """
    own = {name: args[name] for name in ("deadline", "memory") if name in args}
    try:
        return limits_of(**own), choose(args.get("level"))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
