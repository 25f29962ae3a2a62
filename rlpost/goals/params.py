"""Goals in a recipe, and what value networks of them are trained towards."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Optional

from rlpost.key import key

# OmegaConf reads these annotations and refuses `X | None` of dataclasses in places: hence Optional.
# ruff: noqa: UP045


class ValueTarget(StrEnum):
    """What a value network is trained towards."""

    monte_carlo = "monte_carlo"
    """Whether the completion ended in the goal (cross-entropy)."""
    bootstrap = "bootstrap"
    """The value of the next state; where there is none, whether the goal was reached (squared error)."""
    contrastive = "contrastive"
    """To tell a completion's own ending from those of others: log V up to a constant of the prompt."""


@dataclass
class Goals:
    """Where completions are to end: a set of final texts, given by exactly one of `texts`, `path`, `column`."""

    texts: list[str] = field(default_factory=list)
    path: Optional[str] = key(None, path=True)
    """A text file with one ending a line."""
    column: Optional[str] = None
    """Each prompt's own: a column of its row with a text."""
    truncated_counts: bool = False
    """A completion cut off at the length limit may end in a goal too."""
