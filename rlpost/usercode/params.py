"""Functions in recipes: by name, with their arguments and, for those of a user's file, what becomes of failures."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Optional

from omegaconf import MISSING

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


class OnFailure(StrEnum):
    """What becomes of a failed call of a user's function."""

    stop = "stop"
    """The run stops."""
    unscored = "unscored"
    """The completion has no reward: nothing is learned from it."""


@dataclass
class Function:
    """A function by name (or `file.py:function`) with its keyword arguments."""

    fn: str = MISSING
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class TimedFunction(Function):
    """A function that, coming from `file.py:function`, is called in a process of its own."""

    deadline: Optional[float] = None
    """Seconds that one call of such a function may take (60)."""


@dataclass
class EnvironmentFunction(TimedFunction):
    """An environment."""

    on_failure: Optional[OnFailure] = None
    """When such a function raises, hangs or ends its process: `stop` (so by default), or the episode is `unscored`."""
