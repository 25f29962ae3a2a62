"""A reward in a recipe."""

from dataclasses import dataclass, field
from typing import Optional

from rlpost.usercode.params import OnFailure, TimedFunction

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


@dataclass
class Reward(TimedFunction):
    """A reward function, its weight in the sum, and the name it is logged under (its own by default)."""

    weight: float = 1.0
    name: Optional[str] = None
    of: list["Reward"] = field(default_factory=list)
    """The children of a node: `fn` is then sum, product, min, gate, lexicographic or shaping."""
    on_failure: Optional[OnFailure] = None
    """When `file.py:function` raises, hangs, or returns no number: `stop` (so by default), or `unscored`."""
    model: Optional[str] = None
    """For functions that ask for a model: an earlier stage that leaves a judge or reads backwards, or a checkpoint."""
