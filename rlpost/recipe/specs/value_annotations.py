"""Rows annotated with a value network's values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rlpost.goals.params import Goals
from rlpost.recipe.rules import Earlier, Leaves
from rlpost.recipe.specs.common import Stage
from rlpost.section import LocalPath


class ValueAnnotations(Stage):
    """The same rows with a column `value_annotations`: a value network's values of the texts that each row lists, for a
    policy that reads them (docs/goals.md); the model passes unchanged."""

    kind: str = "value_annotations"
    network: LocalPath
    """A `value` stage, or a checkpoint of one; none with `target: contrastive`, which knows values only up to a
    factor."""
    goals: Goals = Field(default_factory=Goals)
    """As in the stage that trained the network."""
    about: str
    """The column with each row's list of texts; `value_annotations` holds a digit for each: V in tenths."""

    function: ClassVar[str] = "rlpost.goals.value_annotations:value_annotations"
    leaves = Leaves.rows

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from self.goals.unnamed(f"{where}.goals")
        yield from earlier.no_model(self.network, f"{where}.network", (Leaves.value,))
