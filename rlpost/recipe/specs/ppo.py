"""Proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from rlpost.key import key
from rlpost.policy.params import Model
from rlpost.recipe.rules import Earlier, Leaves
from rlpost.recipe.specs.common import SURROGATE, Rollouts
from rlpost.stages.params import AtLimit, Critic, KlEstimator, Weight
from rlpost.usercode.params import Function


@dataclass
class Ppo(Rollouts):
    """Proximal policy optimisation with a critic."""

    kind: str = "ppo"
    gamma: float = key(1.0, gt=0, le=1)
    """Discount of a reward, per action."""
    lam: float = key(0.95, ge=0, le=1)
    """λ of generalised advantage estimation."""
    at_limit: AtLimit = AtLimit.terminate
    whiten: bool = True
    """Shift and scale the advantages of all actions of a step to mean 0 and variance 1."""
    loss: Function = key(factory=lambda: Function("clipped_surrogate"), lookup=SURROGATE)
    weight: Weight = Weight.token_mean
    entropy: float = key(0.0, ge=0)
    """Weight of an entropy bonus, averaged over actions."""
    critic: Critic = field(default_factory=Critic)

    function: ClassVar[str] = "rlpost.stages.ppo:ppo"
    kl_in_loss: ClassVar[bool] = False

    def problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of rollouts, and of the critic."""
        yield from super().problems(where, earlier)
        if self.kl.estimator != KlEstimator.k1:
            yield f"{where}.kl.estimator: ppo puts k1 into every action's reward, the exact one - use k1"
        if self.critic.start is not None:
            yield from earlier.no_model(self.critic.start, f"{where}.critic.start", (Leaves.reward_model,))
        if self.step_end is not None:
            yield f"{where}.step_end: ppo credits actions by its critic - use grpo with advantage.fn=process"

    def warnings(self, where: str, model: Model) -> Iterator[str]:
        """Of rollouts, and of credit beyond the end."""
        yield from super().warnings(where, model)
        if self.at_limit == AtLimit.bootstrap:
            yield (
                f"{where}.at_limit: bootstrap credits a completion cut off with what the critic expects after it; "
                "where cut answers are rewarded 0, that pays for running over"
            )
