"""Rows from the model's own samples, ranked by rewards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.recipe.rules import Earlier, Leaves, reward_problems
from rlpost.recipe.specs.common import Stage
from rlpost.rewards.params import REWARD, Reward
from rlpost.stages.params import PairChoice


class Pairs(Stage):
    """Rows from the model's own samples, ranked by rewards; the model passes unchanged."""

    kind: str = "pairs"
    prompts: int | None = Field(None, ge=1)
    """How many prompts to sample (all of them by default)."""
    group_size: int = Field(8, ge=2)
    sampling: Sampling = Field(default_factory=Sampling)
    rollouts: EngineChoice | None = None
    """What samples; by default what the recipe's `rollouts` says."""
    rewards: Annotated[list[Reward], REWARD] = Field(default_factory=list)
    choice: PairChoice = PairChoice.one
    min_gap: float = Field(0.0, ge=0)
    """A pair's rewards must differ by more than this."""

    function: ClassVar[str] = "rlpost.stages.pairs:pairs"
    leaves = Leaves.rows

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from reward_problems(self.rewards, where, earlier)
