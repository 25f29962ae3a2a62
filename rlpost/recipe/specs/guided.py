"""Rows from samples that a value network led to its goals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rlpost.engine.params import LOCAL, EngineChoice, Sampling
from rlpost.goals.params import Goals
from rlpost.recipe.rules import Earlier, Leaves
from rlpost.recipe.specs.common import Stage
from rlpost.section import LocalPath


class Guided(Stage):
    """Rows `prompt, completion` for `sft`: samples that a value network led to its goals (docs/goals.md). A model that
    imitates them needs no network to decode; the model passes unchanged."""

    kind: str = "guided"
    prompts: int | None = Field(None, ge=1)
    """How many prompts to sample; by default all rows."""
    group_size: int = Field(8, ge=1)
    """Completions a prompt."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How completions are drawn."""
    rollouts: EngineChoice | None = None
    """What samples; by default the recipe's `rollouts`."""
    network: LocalPath
    """A `value` stage, or a checkpoint of one; one trained with `avoid` leads away."""
    goals: Goals = Field(default_factory=Goals)
    """As in the stage that trained the network."""
    candidates: int = Field(32, ge=0)
    """Likeliest tokens that are weighed at each step; 0: all."""
    reached_only: bool = True
    """Keep the samples that end as they should, and no others."""

    function: ClassVar[str] = "rlpost.goals.guided:guided"
    leaves = Leaves.rows

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        if (self.rollouts or earlier.rollouts).engine != LOCAL:
            yield (
                f"{where}.rollouts.engine: a guide weighs every token, which only the {LOCAL} engine shows - "
                f"give {where}.rollouts.engine={LOCAL}"
            )
        yield from self.goals.unnamed(f"{where}.goals")
        yield from earlier.no_model(self.network, f"{where}.network", (Leaves.value,))
