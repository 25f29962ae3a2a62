"""Rows for a process reward model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.recipe.rules import Earlier, Leaves, reward_problems
from rlpost.recipe.specs.common import Stage
from rlpost.rewards.params import REWARD, Reward


class StepLabels(Stage):
    """Rows `prompt, steps, labels` for a process reward model, by Math-Shepherd (Wang et al. 2023, arXiv:2312.08935):
    steps of own samples, labelled by fresh rollouts; the model passes unchanged."""

    kind: str = "step_labels"
    prompts: int | None = Field(None, ge=1)
    """How many prompts to sample; by default all rows."""
    group_size: int = Field(2, ge=1)
    """Completions a prompt."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How completions are drawn."""
    rollouts: EngineChoice | None = None
    """What samples; by default the recipe's `rollouts`."""
    rewards: Annotated[list[Reward], REWARD] = Field(default_factory=list)
    """Rewards of a completion; at least one."""
    step_end: str = "\n"
    """A step ends with this text; empty: every token is a step."""
    fresh_rollouts: int = Field(4, ge=1)
    """Rollouts from the end of every step; a label is their mean reward."""

    function: ClassVar[str] = "rlpost.stages.step_labels:step_labels"
    leaves = Leaves.rows

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from reward_problems(self.rewards, where, earlier)
