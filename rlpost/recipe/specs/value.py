"""Models of the probability that a completion ends in a goal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Optional

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.goals.params import Goals, ValueTarget
from rlpost.key import key
from rlpost.recipe.rules import Earlier, Leaves, goals_problems
from rlpost.recipe.specs.common import Training

# ruff: noqa: UP045 - see common.py


@dataclass
class Value(Training):
    """A model of the probability that a completion ends in a goal, from every state on; the policy passes unchanged."""

    kind: str = "value"
    prompts: int = key(32, ge=1)
    """Prompts a step."""
    group_size: int = key(8, ge=1)
    """Completions a prompt, sampled from the policy as it is."""
    updates: int = key(1, ge=1)
    """Optimiser updates a step, each on its share of the prompts."""
    sampling: Sampling = field(default_factory=Sampling)
    rollouts: Optional[EngineChoice] = None
    """What samples; by default what the recipe's `rollouts` says."""
    goals: Goals = field(default_factory=Goals)
    target: ValueTarget = ValueTarget.monte_carlo
    avoid: bool = False
    """Model the probability of not ending in the goal, which is what guiding away needs."""
    condition: Optional[str] = None
    """The model reads the goal: this text, with {goal} for it, stands before the prompt. Without, one model is of all
    goals together."""
    hindsight: float = key(0.0, ge=0, le=1)
    """Share of prompts whose goal is instead an ending that one of their own completions reached."""
    hindsight_tokens: int = key(4, ge=1)
    """Tokens of such an ending, at most."""

    function: ClassVar[str] = "rlpost.goals.value:value"
    leaves = Leaves.value

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of training, of the goals, and of what differs between them."""
        yield from super().problems(where, earlier)
        if self.hindsight < 1:
            yield from goals_problems(self.goals, where)
        contrastive = self.target == ValueTarget.contrastive
        needs = {
            "goals.column": bool(self.goals.column),
            "hindsight": self.hindsight > 0,
            "target: contrastive": contrastive,
        }
        needed = next((name for name, wanted in needs.items() if wanted), None)
        if needed and not self.condition:
            yield (
                f"{where}.condition: with {needed} goals differ, so the model has to read them - give '{{goal}} ', say"
            )
        if self.condition and "{goal}" not in self.condition:
            yield f"{where}.condition: {self.condition!r} does not say where the goal goes - write {{goal}} in it"
        if (self.hindsight or contrastive) and self.group_size < 2:
            yield f"{where}.group_size: another completion's ending is the goal - give at least 2"
        if contrastive and self.avoid:
            yield (
                f"{where}.avoid: a contrastive value has no scale of its own, and 1 − V needs one - use another target"
            )
