"""Reinforcement learning from groups of samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.data.params import DataRole, Direction, Source
from rlpost.policy.params import Model
from rlpost.recipe.grouped import ADVANTAGE, FOCUS, SURROGATE, Grouped, OldKl
from rlpost.recipe.rules import Earlier, source_problems
from rlpost.recipe.specs.sft import LOSS
from rlpost.section import Section
from rlpost.stages.params import AdaptiveEntropy, Contest, Preference, Weight
from rlpost.usercode.params import Function
from rlpost.usercode.signatures import info_of


class ExpertWeight(Section):
    """μ, the share of the expert's rows in the loss; the stage's own has 1 − μ (CHORD, arXiv:2508.11408)."""

    peak: float = Field(0.1, ge=0, le=1)
    """Its largest value."""
    valley: float | None = Field(None, ge=0, le=1)
    """What it falls to; by default it stays at the peak."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which it rises from 0 to the peak."""
    decay_steps: int = Field(0, ge=0)
    """Steps in which it falls from there to the valley, along a cosine."""

    def problems(self, where: str) -> Iterator[str]:
        """Of a fall that is none."""
        if self.valley is not None and self.valley > self.peak:
            yield f"{where}.valley: {self.valley:g} is above peak={self.peak:g} - give at most that"
        if self.valley is None and self.decay_steps:
            yield f"{where}.valley: missing - what the weight falls to in {self.decay_steps} steps, such as 0.05"
        if self.valley is not None and self.valley != self.peak and not self.decay_steps:
            yield f"{where}.decay_steps: missing - the steps in which the weight falls to {self.valley:g}"


class Expert(Section):
    """Rows of an expert that are learned from in every update, beside the policy's own samples: one optimiser step on
    (1 − μ) times the stage's loss and μ times a supervised loss of these rows (CHORD, Zhang et al. 2025,
    arXiv:2508.11408)."""

    data: dict[str, Source] = Field(default_factory=dict)
    """Sources of rows by name, as an `sft` stage has them; at least one."""
    batch_size: int = Field(32, ge=1)
    """Rows an update."""
    loss: Annotated[Function, LOSS] = Field(default_factory=lambda: Function(fn="nll"))
    """The loss of a token of them; in `rlpost/objectives/supervised.py`, those that need no teacher."""
    weight: Weight = Weight.token_mean
    """How much each token of them counts."""
    mu: ExpertWeight = Field(default_factory=ExpertWeight)
    """μ, by the stage's steps."""

    def rows(self) -> DataRole:
        """Completions; with labels, where the loss asks for them."""
        return DataRole.labelled if info_of(self.loss, LOSS).takes("label_N") else DataRole.completions

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Of its sources, and of a loss that needs what there is not."""
        if not self.data:
            yield f"{where}.data: missing - name at least one source, like {{train: {{path: rows.jsonl}}}}"
        yield from source_problems(self.data, f"{where}.data", earlier)
        for name, source in self.data.items():
            if source.direction is Direction.reverse:
                yield f"{where}.data.{name}.direction: reverse is for sft - remove it"
        if info_of(self.loss, LOSS).takes("teacher_NV"):
            yield f"{where}.loss.fn: {self.loss.called} imitates a teacher, and here are rows alone - take another one"


class Grpo(Grouped):
    """Reinforcement learning from groups of sampled completions."""

    kind: str = "grpo"
    loss: Annotated[Function, SURROGATE] = Field(default_factory=lambda: Function(fn="clipped_surrogate"))
    """The loss of a token; in `rlpost/objectives/surrogates.py`."""
    focus: Annotated[Function | None, FOCUS] = None
    """Which tokens of an update are learned from; in `rlpost/objectives/focus.py`. All of them by default; it takes a
    forward pass an update."""
    old_kl: OldKl | None = None
    """A KL to the policy that sampled, in the loss of some tokens or of all; none by default. It is 0 at the first
    update on samples of the same weights."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus, averaged over tokens."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """Adapt that weight, from `entropy_coef` on, so that the entropy does not fall below a target."""
    reply_coef: float = Field(0.0, ge=0)
    """Weight of the likelihood of what an environment or tools replied, averaged over its tokens (ECHO); 0.05 in its
    paper."""
    expert: Expert | None = None
    """Rows of an expert that every update learns from as well (CHORD); none by default."""
    against: Contest | None = None
    """Whom the policy meets: a completion's reward is then how likely it is preferred to what the other policy says to
    the same prompt. By default it is what `rewards` give."""

    function: ClassVar[str] = "rlpost.stages.grpo:grpo"

    @cached_property
    def vanishes_without_advantage(self) -> bool:
        """An action of advantage 0 adds nothing to the gradient, but for that of a KL to the reference."""
        more = self.entropy_coef or self.adaptive_entropy or self.old_kl
        return not more and info_of(self.loss, SURROGATE).has("vanishes_without_advantage")

    @property
    def fits_log_ratio(self) -> bool:
        """The loss counts from the reference, whatever the KL term."""
        return info_of(self.loss, SURROGATE).has("from_reference")

    @property
    def needs_reference(self) -> bool:
        """For the KL, or for the loss."""
        return super().needs_reference or self.fits_log_ratio

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        if self.adaptive_entropy is not None:
            yield from self.adaptive_entropy.start_problems(self.entropy_coef, where)
        if self.adaptive_entropy is not None and self.recorded:
            yield (
                f"{where}.adaptive_entropy: it goes by the entropy of samples, and recorded rollouts are another "
                "policy's - remove it, and give entropy_coef"
            )
        if self.reply_coef and self.environment is None and not self.tools:
            yield f"{where}.reply_coef: nothing replies to the model - name an environment or tools, or remove it"
        if self.expert is not None:
            yield from self.expert.rules(f"{where}.expert", earlier)
        surrogate = info_of(self.loss, SURROGATE)
        whole = surrogate.has("per_completion")
        if self.weight != Weight.sequence_mean and whole:
            yield f"{where}.weight: {self.loss.called} is one value a completion - use sequence_mean"
        if self.fits_log_ratio and self.kl.beta:
            yield f"{where}.kl.beta: {self.loss.called} holds to the reference by itself - use 0, and loss.args.beta"
        if self.against is not None:
            yield from self._contest_problems(where, earlier)
        if self.focus is not None and (whole or not surrogate.has("vanishes_without_advantage")):
            yield (
                f"{where}.focus: {self.loss.called} learns from an action whose advantage is 0 - remove it, or take a "
                "loss that does not (vanishes_without_advantage; docs/recipes.md#functions)"
            )

    def warnings(self, where: str, model: Model) -> Iterator[str]:
        """Of a loss that compares the completions of a group, where there is one."""
        yield from super().warnings(where, model)
        couples = info_of(self.loss, SURROGATE).has("couples_group")
        if self.group_size == 1 and couples and not self.compares_completions:
            yield (
                f"{where}.group_size: {self.loss.called} compares the completions of a group, and of one alone nothing "
                "is learned - use at least 2"
            )

    def _contest_problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from self.against_problems(where, earlier)
        if self.recorded:
            yield f"{where}.against: recorded rollouts are all there is - remove it, or recorded"
        assert self.against is not None, "the caller has seen to it"
        if self.against.preference is Preference.step and self.against.scale != 1:
            yield f"{where}.against.scale: is for preference=bradley_terry, not for step - remove it"
        asked = ("greedy_P", "value_K", "reward_PGK", "step_reward_K")
        if info_of(self.advantage, ADVANTAGE).takes(*asked):
            yield (
                f"{where}.advantage.fn: {self.advantage.called} asks for rewards by themselves, and with `against` a "
                "completion's reward is a preference - take another one, like leave_one_out"
            )
