"""Goals in a recipe, and what value networks of them are trained towards."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from rlpost.section import Choice, Local, Section


class ValueTarget(Choice):
    """What a value network is trained towards."""

    monte_carlo = "monte_carlo"
    """Whether the completion ended in the goal (cross-entropy)."""
    bootstrap = "bootstrap"
    """The value of the next state; where there is none, whether the goal was reached (squared error)."""
    contrastive = "contrastive"
    """To tell a completion's own ending from those of others: log V up to a constant of the prompt."""


class Goals(Section):
    """Where completions are to end: a set of final texts, given by exactly one of `texts`, `path` and `column`."""

    texts: list[str] = Field(default_factory=list)
    """Final texts."""
    path: Annotated[str | None, Local()] = None
    """A text file with one ending a line."""
    column: str | None = None
    """Each prompt's own: a column of its row."""
    truncated_counts: bool = False
    """A completion cut off at the length limit may end in a goal too."""

    def unnamed(self, where: str) -> Iterator[str]:
        """What is wrong where goals have to be given, with key path `where`."""
        given = [n for n, x in (("texts", self.texts), ("path", self.path), ("column", self.column)) if x]
        if len(given) != 1:
            which = " and ".join(given) or "none is given"
            yield f"{where}: give exactly one of texts, path and column ({which})"
