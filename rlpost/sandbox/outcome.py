"""What a program may use, at which level it is held, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum

from rlpost.errors import RecipeError

LEAST_MEMORY = 64
"""MiB of address space that Python itself needs to start."""


class Level(StrEnum):
    """What holds a program, the strongest first (docs/sandbox.md)."""

    namespaces = "namespaces"
    """`landlock`, and a file system, a network and process numbers of its own, with nothing of the machine in them."""
    landlock = "landlock"
    """Files by Landlock, system calls by seccomp, one process, resource limits."""
    rlimits = "rlimits"
    """Resource limits alone: it reads and writes what the user does. Never chosen, only named."""


class Reason(StrEnum):
    """Why a program ended."""

    ended = "ended"
    """By itself, with the exit code in `Outcome.code`."""
    time = "time"
    """It ran too long, by the clock or by what it computed."""
    memory = "memory"
    """Python said MemoryError, and the program ended of it."""
    output = "output"
    """It wrote more than it may."""
    signal = "signal"
    """A signal ended it, whose number is `Outcome.code`; SIGKILL where the machine's memory ran out."""
    refused = "refused"
    """The kernel ended it for a system call of another architecture."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Raises:
        RecipeError: a limit that is not above 0, or memory in which Python cannot start.
    """

    seconds: float = 10.0
    """By the clock, from before Python starts."""
    cpu_seconds: int = 5
    """Of computing, of all its threads together."""
    memory: int = 512
    """MiB of address space."""
    disk: int = 64
    """MiB that it may write; by file, at levels below `namespaces`."""
    output: int = 1 << 20
    """Bytes that it may write to stdout, and as many to stderr."""
    files: int = 64
    """Open at one time."""
    threads: int = 16
    """At one time, its first one included; at level `namespaces`. At `landlock` memory is what limits them."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise RecipeError(f"sandbox: {field.name} is {getattr(self, field.name)}; give more than 0")
        if self.memory < LEAST_MEMORY:
            raise RecipeError(f"sandbox: memory is {self.memory} MiB; Python needs at least {LEAST_MEMORY} to start")


def limits_of(*, deadline: float = 5.0, memory: int = 512) -> Limits:
    """What a program may use by a recipe's arguments: `deadline` seconds of computing and twice that by the clock.

    Raises:
        RecipeError: too little.
    """
    if not 0 < deadline <= 3600:
        raise RecipeError(f"sandbox: deadline is {deadline}; give seconds a run, more than 0, at most 3600")
    return Limits(seconds=2 * deadline, cpu_seconds=math.ceil(deadline), memory=memory)


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    stdout: str
    """Read as UTF-8, what is none replaced; cut at `Limits.output`."""
    stderr: str
    """The same."""
    reason: Reason
    code: int
    """The exit code, or the number of the signal."""
    seconds: float
    """By the clock."""
    level: Level
    """What held it."""

    @property
    def succeeded(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.reason is Reason.ended and self.code == 0
