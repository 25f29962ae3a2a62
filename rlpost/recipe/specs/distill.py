"""On-policy distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.data.columns import Naming
from rlpost.engine.params import ScoringChoice
from rlpost.errors import RecipeError
from rlpost.policy.params import Model
from rlpost.recipe.grouped import SURROGATE, Grouped
from rlpost.recipe.rules import Earlier
from rlpost.rewards.of_environment import is_class
from rlpost.section import Choice, Local
from rlpost.stages.params import Weight
from rlpost.usercode.params import Function, Lookup
from rlpost.usercode.signatures import info_of

DIVERGENCE = Lookup(
    "distill.loss", "rlpost.objectives.supervised", ("logp_NV", "teacher_NV"), by_name=True, returns="elements"
)
SELF = "self"
"""A teacher: the student as it is."""


class StateCredit(Choice):
    """What an action answers for."""

    state = "state"
    """The divergence in the state that it is taken in: the usual choice, of little variance, and biased, since an
    action decides which states follow."""
    completion = "completion"
    """Also that of the states that it leads to, less those of the group's other completions: exact for the divergence
    that a completion meets (docs/objectives.md#on-policy-distillation). It takes a forward pass an update more."""


class Estimate(Choice):
    """What the divergence in a state is taken from."""

    distribution = "distribution"
    """The probabilities of all tokens, or of the teacher's likeliest (`top_k`)."""
    sampled = "sampled"
    """The sampled token's alone: log π − log teacher, as the cost of a policy gradient, with `loss: {fn: reverse_kl}`.
    """


class Distill(Grouped):
    """On-policy distillation: the student samples, and a teacher scores every token."""

    kind: str = "distill"
    teacher: Annotated[str | None, Local()] = None
    """A model of the same tokenizer, by stage, checkpoint, folder or hub name; `start`, where this stage begins, or
    `self`, the student as it is, each shown another prompt (`privileged`)."""
    teacher_engine: ScoringChoice | None = None
    """An engine behind which the teacher stands, instead of a model that is loaded here; with `top_k`, or with
    `estimate: sampled` (docs/engines.md#engines-that-score)."""
    loss: Annotated[Function, DIVERGENCE] = Field(default_factory=lambda: Function(fn="reverse_kl"))
    """The divergence of student and teacher in a state; in `rlpost/objectives/supervised.py`."""
    top_k: int | None = Field(None, ge=1)
    """Take it over the teacher's so many likeliest tokens, and one class for all others: a lower bound. By default over
    the whole vocabulary."""
    estimate: Estimate = Estimate.distribution
    """What the divergence in a state is taken from."""
    credit: StateCredit = StateCredit.state
    """What an action answers for."""
    reward_coef: float = Field(0.0, ge=0)
    """Weight of the rewards' advantage beside the divergence; 0: rewards are not needed, and only logged."""
    surrogate: Annotated[Function, SURROGATE] = Field(default_factory=lambda: Function(fn="clipped_surrogate"))
    """What makes a loss of advantages: of rewards, of sampled tokens, of states that actions lead to; in
    `rlpost/objectives/surrogates.py`."""
    privileged: str | None = None
    """The prompt that the teacher is shown instead of the student's, over the row's columns: `"The answer is
    {answer}.\\n{prompt}"`. Of a conversation, the text of its last message (docs/distillation.md#self-distillation)."""

    function: ClassVar[str] = "rlpost.stages.distill:distill"

    @property
    def needs_rewards(self) -> bool:
        """Only where they count."""
        return self.rewards_count

    @property
    def rewards_count(self) -> bool:
        """With a weight."""
        return self.reward_coef > 0

    @property
    def has_advantages(self) -> bool:
        """Whether there is a policy gradient beside the divergence of each state."""
        return self.reward_coef > 0 or self.credit is StateCredit.completion or self.estimate is Estimate.sampled

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        yield from super().rules(where, earlier)
        yield from self._teacher_problems(where, earlier)
        if self.recorded:
            yield f"{where}.recorded: distill learns from samples of its own - remove it, or distil by sft's `teacher`"
        if self.kl.beta:
            yield f"{where}.kl.beta: distill holds to its teacher, and to no reference beside it - use 0"
        if self.estimate is Estimate.sampled and self.top_k is not None:
            yield f"{where}.top_k: with estimate=sampled no other token is looked at - remove it"
        if self.estimate is Estimate.sampled and self.loss.fn != "reverse_kl":
            yield (
                f"{where}.loss.fn: the sampled tokens alone estimate KL(student || teacher), not {self.loss.called} - "
                "use reverse_kl, or estimate: distribution"
            )
        for key in ("whiten", "dynamic_sampling_rounds"):
            if getattr(self, key) and not self.reward_coef:
                yield f"{where}.{key}: is about rewards, which do not count with reward_coef=0 - remove it"
        yield from self._unread(where)
        if self.weight != Weight.sequence_mean and info_of(self.surrogate, SURROGATE).has("per_completion"):
            yield f"{where}.weight: {self.surrogate.called} is one value a completion - use sequence_mean"

    def _unread(self, where: str) -> Iterator[str]:
        """Functions that are given and would not be called."""
        fields = type(self).model_fields
        if not self.reward_coef and self.advantage != fields["advantage"].get_default(call_default_factory=True):
            yield f"{where}.advantage: is about rewards, which do not count with reward_coef=0 - remove it"
        if not self.has_advantages and self.surrogate != fields["surrogate"].get_default(call_default_factory=True):
            yield (
                f"{where}.surrogate: there are no advantages that it would make a loss of - remove it, or give "
                "reward_coef, credit: completion or estimate: sampled"
            )

    def _teacher_problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        if self.teacher_engine is not None:
            yield from self._engine_problems(self.teacher_engine, where)
        elif self.teacher is None:
            yield f"{where}.teacher: missing - name a stage, a checkpoint or a model, or `self` with `privileged`"
        elif self.teacher in (SELF, "start") and self.privileged is None:
            yield (
                f"{where}.privileged: missing - {self.teacher} is the student itself, which teaches what it is shown "
                'beside the prompt: give a template like "{answer} is right. {prompt}"'
            )
        elif self.teacher in earlier.all:
            yield from earlier.no_policy(self.teacher, f"{where}.teacher", ("start", "base", SELF))
        if self.privileged is None:
            return
        if is_class(self.environment):
            yield f"{where}.privileged: the environment writes the prompt of its episodes - remove one of the two"
        if "{" not in self.privileged:
            yield f'{where}.privileged: names no column of the rows - write it like "{{answer}} is right. {{prompt}}"'
        try:
            Naming({"prompt": self.privileged}, where)
        except RecipeError as error:
            yield str(error).replace(f"{where}.prompt", f"{where}.privileged")

    def _engine_problems(self, engine: ScoringChoice, where: str) -> Iterator[str]:
        if self.teacher is not None:
            yield f"{where}.teacher: the teacher stands behind teacher_engine already - remove one of the two"
        if self.estimate is Estimate.distribution and self.top_k is None:
            yield (
                f"{where}.top_k: missing - an engine tells the likeliest tokens only: give how many, like 16, or take "
                "estimate: sampled"
            )
        yield from engine.unlike_vllm(self.sampling.temperature, f"{where}.sampling.temperature")

    def warnings(self, where: str, model: Model) -> Iterator[str]:
        """Those of rewards only where they count."""
        for line in super().warnings(where, model):
            if self.reward_coef or not line.startswith(f"{where}.group_size"):
                yield line
