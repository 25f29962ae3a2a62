"""Rows with what a value network guesses about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rlpost.goals.params import Goals
from rlpost.recipe.rules import Earlier, Leaves
from rlpost.recipe.specs.common import Stage
from rlpost.section import LocalPath


class Guesses(Stage):
    """Rows with what a value network guesses about them, for a policy that reads it; the model passes unchanged."""

    kind: str = "guesses"
    network: LocalPath
    """A stage of kind value, or a checkpoint of one."""
    goals: Goals = Field(default_factory=Goals)
    """As in the stage that trained the network."""
    about: str
    """The column in which a row lists the texts to ask about; `guesses` will hold a digit for each."""

    function: ClassVar[str] = "rlpost.goals.guesses:guesses"
    leaves = Leaves.rows

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from self.goals.unnamed(f"{where}.goals")
        yield from earlier.no_model(self.network, f"{where}.network", (Leaves.value,))
