"""Rows for a process reward model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.key import key
from rlpost.recipe.rules import Earlier, Leaves, reward_problems, sampling_problems
from rlpost.recipe.specs.common import Stage
from rlpost.rewards.params import REWARD, Reward

# ruff: noqa: UP045 - see common.py


@dataclass
class StepLabels(Stage):
    """Rows for a process reward model: steps of own samples, labelled by fresh rollouts; the model passes unchanged."""

    kind: str = "step_labels"
    prompts: Optional[int] = key(None, ge=1)
    """How many prompts to sample (all of them by default)."""
    group_size: int = key(2, ge=1)
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    rewards: list[Reward] = key(factory=list, lookup=REWARD)
    step_end: str = "\n"
    """A step ends with this text; empty: every token is a step."""
    fresh_rollouts: int = key(4, ge=1)
    """Rollouts from the end of every step; a label is their mean reward."""

    function: ClassVar[str] = "rlpost.stages.step_labels:step_labels"
    leaves = Leaves.rows

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of every stage, of rewards and of sampling."""
        yield from super().problems(where, earlier)
        yield from reward_problems(self.rewards, where, earlier)
        yield from sampling_problems(self.sampling, f"{where}.sampling")
