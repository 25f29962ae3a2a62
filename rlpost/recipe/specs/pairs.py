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
    """Samples completions, scores them and writes rows for later stages; the model passes unchanged. Completions that
    were cut off or are unscored enter no row, nor do blank answers to a conversation; `choice: valued` writes prompts
    alone."""

    kind: str = "pairs"
    prompts: int | None = Field(None, ge=1)
    """How many prompts to sample; by default all rows."""
    group_size: int = Field(8, ge=2)
    """Completions a prompt."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How completions are drawn."""
    rollouts: EngineChoice | None = None
    """What samples; by default the recipe's `rollouts`."""
    rewards: Annotated[list[Reward], REWARD] = Field(default_factory=list)
    """Rewards of a completion; at least one."""
    choice: PairChoice = PairChoice.one
    """What rows a group of scored samples gives."""
    min_gap: float = Field(0.0, ge=0)
    """Rewards of a pair differ by more than this."""
    beta: float | None = Field(None, gt=0)
    """With `choice: valued`: β of the optimal value; small ones come near a prompt's best reward, large ones near its
    mean."""
    solved_above: float | None = None
    """With `choice: valued`: prompts without a reward above this are left out. By default they stay."""

    function: ClassVar[str] = "rlpost.stages.pairs:pairs"
    leaves = Leaves.rows

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from reward_problems(self.rewards, where, earlier)
        valued = self.choice is PairChoice.valued
        if valued and self.beta is None:
            yield f"{where}.beta: missing - choice=valued writes β·log mean e^(r/β): give β, like 0.5"
        for key in ("beta", "solved_above"):
            if not valued and getattr(self, key) is not None:
                yield f"{where}.{key}: is for choice=valued, not for {self.choice} - remove it"
        if valued and self.min_gap:
            yield f"{where}.min_gap: choice=valued compares no completions - remove it"
