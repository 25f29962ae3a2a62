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
    """The same rows with a column `guesses`: what a value network says of texts that each row lists, for a policy that
    reads it (docs/goals.md); the model passes unchanged."""

    kind: str = "guesses"
    network: LocalPath
    """A `value` stage, or a checkpoint of one; none with `target: contrastive`, which knows values only up to a
    factor."""
    goals: Goals = Field(default_factory=Goals)
    """As in the stage that trained the network."""
    about: str
    """The column with each row's list of texts; `guesses` holds a digit for each: V in tenths."""

    function: ClassVar[str] = "rlpost.goals.guesses:guesses"
    leaves = Leaves.rows

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from self.goals.unnamed(f"{where}.goals")
        yield from earlier.no_model(self.network, f"{where}.network", (Leaves.value,))
