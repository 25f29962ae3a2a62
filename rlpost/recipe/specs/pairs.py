"""Rows from the model's own samples, ranked by rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.key import key
from rlpost.recipe.rules import Earlier, Leaves, reward_problems, sampling_problems
from rlpost.recipe.specs.common import Stage
from rlpost.rewards.params import REWARD, Reward
from rlpost.stages.params import PairChoice

# ruff: noqa: UP045 - see common.py


@dataclass
class Pairs(Stage):
    """Rows from the model's own samples, ranked by rewards; the model passes unchanged."""

    kind: str = "pairs"
    prompts: Optional[int] = key(None, ge=1)
    """How many prompts to sample (all of them by default)."""
    group_size: int = key(8, ge=2)
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    rewards: list[Reward] = key(factory=list, lookup=REWARD)
    choice: PairChoice = PairChoice.one
    min_gap: float = key(0.0, ge=0)
    """A pair's rewards must differ by more than this."""

    function: ClassVar[str] = "rlpost.stages.pairs:pairs"
    leaves = Leaves.rows

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of every stage, of rewards and of sampling."""
        yield from super().problems(where, earlier)
        yield from reward_problems(self.rewards, where, earlier)
        yield from sampling_problems(self.sampling, f"{where}.sampling")
