"""Proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.policy.params import Model
from rlpost.recipe.grouped import SURROGATE
from rlpost.recipe.rules import Earlier, Leaves
from rlpost.recipe.specs.common import Rollouts
from rlpost.stages.params import AdaptiveEntropy, CreditUnit, Critic, KlEstimator, OnTruncation, Weight
from rlpost.usercode.params import Function
from rlpost.usercode.signatures import info_of


class Ppo(Rollouts):
    """Proximal policy optimisation with a critic. KL goes into the reward, token by token."""

    kind: str = "ppo"
    credit: CreditUnit = CreditUnit.token
    """What the critic values and the advantage is of."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a reward, per token or turn."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ of generalised advantage estimation."""
    on_truncation: OnTruncation = OnTruncation.terminate
    """What the length limit means."""
    whiten: bool = True
    """Shift and scale the advantages of all tokens of a step to mean 0 and variance 1."""
    loss: Annotated[Function, SURROGATE] = Field(default_factory=lambda: Function(fn="clipped_surrogate"))
    """The loss of a token; in `rlpost/objectives/surrogates.py`."""
    weight: Weight = Weight.token_mean
    """How much each token counts."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus, averaged over tokens."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """Adapt that weight, from `entropy_coef` on, so that the entropy does not fall below a target."""
    critic: Critic = Field(default_factory=Critic)
    """The value network."""

    function: ClassVar[str] = "rlpost.stages.ppo:ppo"
    kl_in_loss: ClassVar[bool] = False

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        if self.adaptive_entropy is not None:
            yield from self.adaptive_entropy.start_problems(self.entropy_coef, where)
        if self.kl.estimator != KlEstimator.k1:
            yield f"{where}.kl.estimator: ppo puts k1 into every action's reward, the exact one - use k1"
        if info_of(self.loss, SURROGATE).has("couples_group"):
            yield f"{where}.loss.fn: {self.loss.called} compares a group's completions - take another, or kind: grpo"
        if info_of(self.loss, SURROGATE).has("from_reference"):
            yield f"{where}.loss.fn: {self.loss.called} fits one advantage a completion, as grpo has - take another"
        if self.critic.start is not None:
            yield from earlier.no_model(self.critic.start, f"{where}.critic.start", (Leaves.reward_model,))

    def warnings(self, where: str, model: Model) -> Iterator[str]:
        yield from super().warnings(where, model)
        if self.on_truncation == OnTruncation.bootstrap:
            yield (
                f"{where}.on_truncation: bootstrap credits a completion cut off with what the critic expects after it; "
                "where cut answers are rewarded 0, that pays for running over"
            )
