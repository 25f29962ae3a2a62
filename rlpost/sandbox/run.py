"""Runs a program that nobody has read."""

from __future__ import annotations

from rlpost.errors import RewardError
from rlpost.sandbox.levels import choose
from rlpost.sandbox.outcome import Limits, Outcome
from rlpost.sandbox.process import Broken, execute

__all__ = ["run"]

DEFAULTS = Limits()


def run(program: str, *, stdin: str = "", limits: Limits = DEFAULTS, level: str | None = None) -> Outcome:
    """Run a Python program in a process of its own, with the standard library alone, and wait for its end.

    It runs in an empty folder that is deleted with all it wrote, in UTF-8, and finds `stdin` on its stdin. `level` is
    a name of `outcome.Level`; None takes the strongest that holds here. Threads may call this at the same time.

    Raises:
        RecipeError: no such level holds on this machine.
        RewardError: the sandbox could not be made this time; the program was not run.
    """
    held = choose(level)
    try:
        return execute(program, stdin, limits, held)
    except Broken as error:
        raise RewardError(f"sandbox: level {held} could not be made: {error}; `rlpost doctor` looks at it") from error
