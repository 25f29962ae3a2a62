"""Rows from samples that a value network led to its goals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from rlpost.engine.params import LOCAL, EngineChoice, Sampling
from rlpost.goals.params import Goals
from rlpost.key import key
from rlpost.recipe.rules import Earlier, Leaves, goals_problems, sampling_problems
from rlpost.recipe.specs.common import Stage

# ruff: noqa: UP045 - see common.py


@dataclass
class Guided(Stage):
    """Rows from samples that a value network led to its goals, for `sft` to imitate; the model passes unchanged."""

    kind: str = "guided"
    prompts: Optional[int] = key(None, ge=1)
    """How many prompts to sample (all of them by default)."""
    group_size: int = key(8, ge=1)
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    network: str = key(path=True)
    """A stage of kind value, or a checkpoint of one."""
    goals: Goals = field(default_factory=Goals)
    """As in the stage that trained the network."""
    candidates: int = key(32, ge=0)
    """Likeliest tokens that are weighed at each step; 0: all."""
    reached_only: bool = True
    """Keep the samples that end as they should, and no others."""

    function: ClassVar[str] = "rlpost.goals.guided:guided"
    leaves = Leaves.rows

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of every stage, of sampling, of the goals and of the network."""
        yield from super().problems(where, earlier)
        yield from sampling_problems(self.sampling, f"{where}.sampling")
        if (self.rollouts or earlier.rollouts).engine != LOCAL:
            yield (
                f"{where}.rollouts.engine: a guide weighs every token, which only the {LOCAL} engine shows - "
                f"give {where}.rollouts.engine={LOCAL}"
            )
        yield from goals_problems(self.goals, where)
        yield from earlier.no_model(self.network, f"{where}.network", (Leaves.value,))
