"""A tool that runs what the model writes as a Python program, in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlpost.errors import RecipeError
from rlpost.sandbox.levels import checked
from rlpost.sandbox.outcome import Level, Limits, Outcome, Reason
from rlpost.sandbox.run import run

SILENT = "The program printed nothing."
"""The answer to a program that prints nothing and ends well."""
LONGEST_ERROR = 300
"""Characters of an error's last line."""


def python(
    code: str, *, deadline: float = 5.0, memory: int = 512, level: str | None = None, longest: int = 2000
) -> str:
    """Run a Python program, and return what it prints.

    Args:
        code: The whole program. It has the standard library, no files and no network. Print what you want to see.
        deadline: Seconds of computing that it may take, and twice as many by the clock.
        memory: Most memory, in MiB.
        level: Of the sandbox; by default the strongest that holds here.
        longest: Characters of what it prints that are returned.

    Returns:
        What it printed, then the last line of its error, if any. Of a program that took too long, only that it did.

    Raises:
        RecipeError: no sandbox holds on this machine, or an argument is wrong.
        RewardError: the sandbox could not be made.
    """
    return ready({"deadline": deadline, "memory": memory, "level": level, "longest": longest}, "python", Path())(code)


def ready(args: Mapping[str, Any], where: str, base: Path) -> Callable[[str], str]:  # noqa: ARG001
    """The tool with arguments that are checked, once; `where` is their key path.

    Raises:
        RecipeError: an argument is wrong, or no sandbox holds here as they ask for.
    """
    longest = args.get("longest", 2000)
    if longest < 1:
        raise RecipeError(f"{where}.longest: {longest} leaves nothing of what a program prints; give 1 or more")
    limits, level = checked(args, where)
    return partial(_answer, limits=limits, level=level, longest=longest)


# Called instead of the function when a recipe is bound (rlpost/usercode/binding.py).
vars(python)["ready"] = ready


def _answer(code: str, *, limits: Limits, level: Level, longest: int) -> str:
    outcome = run(code, limits=limits, level=level)
    printed = outcome.stdout.rstrip()
    if outcome.reason is Reason.time:
        printed = ""  # how far it came depends on how busy the machine is
    if len(printed) > longest:
        printed = f"{printed[:longest]}… (cut after {longest} characters)"
    lines = [line for line in (printed, _error(outcome, limits)) if line]
    return "\n".join(lines) or SILENT


def _error(outcome: Outcome, limits: Limits) -> str:
    """Why the program did not end well, in a line; empty if it did."""
    if outcome.succeeded:
        return ""
    if outcome.reason is Reason.time:
        return f"Error: the program took longer than {limits.cpu_seconds} s of computing or {limits.seconds:g} s in all"
    if outcome.reason is Reason.output:
        return "Error: the program printed too much"
    if outcome.reason is Reason.refused:
        return "Error: the program was ended for a system call of another architecture"
    if outcome.reason is Reason.signal:
        return f"Error: the program was ended by signal {outcome.code}"
    last = outcome.stderr.rstrip().rpartition("\n")[2][:LONGEST_ERROR]
    return last or f"Error: the program ended with exit code {outcome.code}"
