"""Rows with what a value network guesses about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from rlpost.goals.params import Goals
from rlpost.key import key
from rlpost.recipe.rules import Earlier, Leaves, goals_problems
from rlpost.recipe.specs.common import Stage


@dataclass
class Guesses(Stage):
    """Rows with what a value network guesses about them, for a policy that reads it; the model passes unchanged."""

    kind: str = "guesses"
    network: str = key(path=True)
    """A stage of kind value, or a checkpoint of one."""
    goals: Goals = field(default_factory=Goals)
    """As in the stage that trained the network."""
    about: str = key()
    """The column in which a row lists the texts to ask about; `guesses` will hold a digit for each."""

    function: ClassVar[str] = "rlpost.goals.guesses:guesses"
    leaves = Leaves.rows

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of every stage, of the goals and of the network."""
        yield from super().problems(where, earlier)
        yield from goals_problems(self.goals, where)
        yield from earlier.no_model(self.network, f"{where}.network", (Leaves.value,))
