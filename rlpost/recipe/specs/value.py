"""Models of the probability that a completion ends in a goal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.goals.params import Goals, ValueTarget
from rlpost.recipe.rules import Earlier, Leaves
from rlpost.recipe.specs.common import Training


class Value(Training):
    """A model of the probability that the policy's completion ends in a goal, from every state on, for `rlpost goals
    sample` (docs/goals.md); the policy passes unchanged."""

    kind: str = "value"
    prompts_per_step: int = Field(32, ge=1)
    """Prompts a step."""
    group_size: int = Field(8, ge=1)
    """Completions a prompt, sampled from the policy as it is."""
    num_minibatches: int = Field(1, ge=1)
    """Optimiser updates a step, each on its share of the prompts."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How completions are drawn."""
    rollouts: EngineChoice | None = None
    """What samples; by default the recipe's `rollouts`."""
    goals: Goals = Field(default_factory=Goals)
    """Where completions are to end."""
    target: ValueTarget = ValueTarget.monte_carlo
    """What the network is trained towards."""
    avoid: bool = False
    """Model the probability of not ending in a goal, which is what guiding away needs."""
    condition: str | None = None
    """The network reads its goal: this text, with `{goal}` for it, stands before the prompt. Without it, one network is
    for all goals together."""
    hindsight: float = Field(0.0, ge=0, le=1)
    """Share of prompts whose goal is instead an ending that one of their own completions reached."""
    hindsight_tokens: int = Field(4, ge=1)
    """Tokens of such an ending, at most."""

    function: ClassVar[str] = "rlpost.goals.value:value"
    leaves = Leaves.value

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        if self.hindsight < 1:
            yield from self.goals.unnamed(f"{where}.goals")
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
