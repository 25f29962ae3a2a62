"""Reinforcement learning from groups of samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import SURROGATE, Grouped
from rlpost.stages.params import Weight
from rlpost.usercode.params import Function
from rlpost.usercode.signatures import info_of


class Grpo(Grouped):
    """Reinforcement learning from groups of sampled completions."""

    kind: str = "grpo"
    loss: Annotated[Function, SURROGATE] = Field(default_factory=lambda: Function(fn="clipped_surrogate"))
    """The loss of a token; in `rlpost/objectives/surrogates.py`."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus, averaged over tokens."""

    function: ClassVar[str] = "rlpost.stages.grpo:grpo"

    @cached_property
    def vanishes_without_advantage(self) -> bool:
        """An action of advantage 0 adds nothing to the gradient, but for a KL's."""
        return not self.entropy_coef and info_of(self.loss, SURROGATE).has("vanishes_without_advantage")

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        if self.weight != Weight.sequence_mean and info_of(self.loss, SURROGATE).has("per_completion"):
            yield f"{where}.weight: {self.loss.called} is one value a completion - use sequence_mean"
