"""What all kinds of stages have in a recipe, what all have that train, and all that learn from their own samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlpost.data.params import DataRole, Direction, Source, TooLong
from rlpost.engine.params import LOCAL, EngineChoice, Sampling
from rlpost.policy.params import Model
from rlpost.recipe.rules import Earlier, Leaves, reward_problems, source_problems
from rlpost.rewards.of_environment import environment_problems, has_second_player, is_class
from rlpost.rewards.params import REWARD, Reward, reward_leaves
from rlpost.section import Section
from rlpost.stages.params import Correction, Kl, KlEstimator, KlPlacement, Opponents
from rlpost.suggest import hint_or_list
from rlpost.train.params import KeepBest, OptimizerName, Schedule
from rlpost.usercode.params import (
    ENVIRONMENT,
    TOOL,
    EnvironmentFunction,
    ToolFunction,
    tool_problems,
)
from rlpost.usercode.places import OF_FILE

Beta = Annotated[float, Field(ge=0, lt=1)]


class Stage(Section):
    """What every stage has, whatever its kind."""

    kind: str
    """What the stage does: a kind of rlpost, or one of your own, as `file.py:function`
    (docs/extending.md#a-kind-of-stage)."""
    enabled: bool = True
    """`false` leaves the stage out of the pipeline."""
    start: str | None = None
    """The earlier stage whose model this one starts from, or `base`; by default the stage before."""
    data: dict[str, Source] = Field(default_factory=dict)
    """Sources of rows by name; at least one."""

    function: ClassVar[str] = ""
    """`module:name` of what the stage does."""
    file: ClassVar[tuple[str, str] | None] = None
    """Of a user's own kind: the file and its sha256."""
    leaves: ClassVar[Leaves | str] = Leaves.policy
    """What those after it find; also by name."""

    def rows(self) -> DataRole:
        """What its rows are for."""
        return DataRole.prompts

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        """What is wrong with the stage at key path `where`, given those before it, in lines."""
        if self.start is not None:
            yield from earlier.no_policy(self.start, f"{where}.start", ("base",))
        if not self.data:
            yield f"{where}.data: missing - name at least one source, like {{train: {{path: rows.jsonl}}}}"
        yield from source_problems(self.data, f"{where}.data", earlier)
        yield from self._direction_problems(f"{where}.data")

    def _direction_problems(self, where: str) -> Iterator[str]:
        for name, source in self.data.items():
            if source.direction is Direction.reverse:
                yield f"{where}.{name}.direction: reverse is for sft - remove it"

    def warnings(self, where: str, model: Model) -> Iterator[str]:  # noqa: ARG002 - for those that have some
        """What is legal, but perhaps not meant."""
        yield from ()


class Training(Stage):
    """What every stage that updates weights has."""

    steps: int | None = Field(None, ge=1)
    """Optimiser steps; or give `epochs`. Of stages that sample: steps of sampling, and required."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the rows; not for stages that sample."""
    optimizer: OptimizerName = OptimizerName.adamw
    """What makes a step of a gradient; `trpo` takes its own steps."""
    learning_rate: float = Field(gt=0)
    """The peak of the learning rate."""
    schedule: Schedule = Schedule.linear
    """Shape of the learning rate after the warm-up."""
    warmup: float = Field(0.0, ge=0)
    """Updates during which the learning rate rises: below 1 a share of all updates, from 1 on their number."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of matrices; gains and biases have none."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """β₁ and β₂ of AdamW; Muon's momentum is 0.95."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them."""
    max_tokens_per_microbatch: int = Field(4096, ge=1)
    """Token budget of one forward and backward pass; the gradient does not depend on it beyond rounding."""
    aux_loss_coef: float | None = Field(None, ge=0)
    """Weight of a mixture of experts' balance loss, `router_balance` in the metrics
    (docs/how-it-works.md#the-learner-counts-once); 0: none. By default the model's own `router_aux_loss_coef`; `trpo`
    has none."""
    max_length: int = Field(1024, ge=2)
    """Tokens of prompt and completion together; where the stage samples, more than `sampling.max_new_tokens`. The
    model's positions limit rows as well."""
    too_long: TooLong = TooLong.refuse
    """What happens to longer rows."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints to keep; older ones are removed."""
    log_every: int = Field(1, ge=1)
    """Steps between lines of `metrics.jsonl`."""
    eval_every: int | None = Field(None, ge=0)
    """Steps between evaluations while the stage trains, beside one after its last step; 0: none
    (docs/runs.md#evaluating-while-a-stage-trains). By default `evaluation.every`."""
    keep_best: KeepBest | None = None
    """The result has the weights of the best evaluation; by default the last ones."""

    balances: ClassVar[bool] = True
    """Its updates can have a mixture of experts' balance loss."""

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of every stage, of its length and of its warm-up."""
        yield from super().rules(where, earlier)
        yield from self._length_problems(where)
        yield from self._evaluation_problems(where, earlier)
        if self.warmup > 1 and self.warmup != int(self.warmup):
            yield f"{where}.warmup: {self.warmup} - a share below 1, or a whole number of updates"

    def _length_problems(self, where: str) -> Iterator[str]:
        if (self.steps is None) == (self.epochs is None):
            given = "neither is given" if self.steps is None else "not both"
            yield f"{where}: give exactly one of {where}.steps and {where}.epochs ({given})"

    def eval_metrics(self) -> tuple[str, ...]:
        """Names of the metrics of held-out rows of its own."""
        return ()

    def _evaluation_problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        whole = earlier.evaluation
        names = [*self.eval_metrics(), *(whole.metrics() if whole and self.leaves is Leaves.policy else ())]
        every = earlier.eval_every if self.eval_every is None else self.eval_every
        own = isinstance(self, Offline)
        what = f"give an `evaluation`, or {where}.eval_data" if own else "give an `evaluation` on prompts"
        if self.eval_every and not names:
            yield f"{where}.eval_every: there is nothing to evaluate - {what if own or whole is None else 'remove it'}"
        if self.eval_every and self.steps is not None and self.eval_every > self.steps:
            yield f"{where}.eval_every: {self.eval_every} - the stage has {self.steps} steps, so give at most that"
        if self.keep_best is None:
            return
        if not names:
            yield f"{where}.keep_best: there is nothing to compare - {what}"
        elif not every:
            yield f"{where}.keep_best: compares evaluations while the stage trains - give {where}.eval_every, like 50"
        elif self.keep_best.metric not in names:
            metric = self.keep_best.metric
            yield f"{where}.keep_best.metric: no metric {metric!r}{hint_or_list(metric, names, 'there are')}"


class Offline(Training):
    """What every stage has that learns from given rows."""

    eval_data: dict[str, Source] = Field(default_factory=dict)
    """Held-out rows, like those of `data`: every `eval_every` steps their loss and the stage's other metrics go to
    `evaluations.jsonl`. None by default."""

    measured: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics of held-out rows."""

    def eval_metrics(self) -> tuple[str, ...]:
        """Its metrics, if there are held-out rows."""
        return self.measured if self.eval_data else ()

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of every stage that trains, and of its held-out rows."""
        yield from super().rules(where, earlier)
        yield from source_problems(self.eval_data, f"{where}.eval_data", earlier)
        if self.eval_data and not (self.eval_every or (self.eval_every is None and earlier.eval_every)):
            yield f"{where}.eval_data: is never measured - give {where}.eval_every, like 50"
        way = next((source.direction for source in self.data.values()), Direction.forward)
        for name, source in self.eval_data.items():
            if source.direction is not way:
                yield f"{where}.eval_data.{name}.direction: {source.direction} - read it as `data` is read: {way}"


class Rollouts(Training):
    """What every stage that learns from samples of its own policy has."""

    prompts_per_step: int = Field(32, ge=1)
    """Prompts a step."""
    group_size: int = Field(8, ge=1)
    """Completions a prompt."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How completions are drawn."""
    rollouts: EngineChoice | None = None
    """What samples; by default the recipe's `rollouts`."""
    correction: Correction = Field(default_factory=Correction)
    """Importance weights between sampler and trainer."""
    rewards: Annotated[list[Reward], REWARD] = Field(default_factory=list)
    """Rewards of a completion; at least one, but for `distill`."""
    kl: Kl = Field(default_factory=Kl)
    """KL to the reference: how much it counts, where, and how it is estimated."""
    reference: str = "start"
    """The reference model: `start` (where this stage begins), `base`, or an earlier stage that trains."""
    num_minibatches: int = Field(1, ge=1)
    """Optimiser updates in a pass over the step's samples, each on its share of the groups."""
    num_iterations: int = Field(1, ge=1)
    """Passes over the step's samples."""
    mask_truncated: bool = False
    """Leave completions cut at the length limit out of the advantage and the update."""
    environment: Annotated[EnvironmentFunction | None, ENVIRONMENT] = None
    """What answers the model's turns: a function (text, turns, example) -> reply, or null when the episode is over; or
    a class with `reset` and `step`."""
    tools: Annotated[list[ToolFunction], TOOL] = Field(default_factory=list)
    """Functions that the model can call, instead of an environment; what they return is for its next turn."""
    max_turns: int = Field(2, ge=1)
    """With an environment or tools: most turns of the model."""
    opponents: Opponents | None = None
    """Self-play: the policy and its past versions play the environment's second player."""
    step_end: str | None = None
    """The text that ends a step of a completion, for rewards and advantages by step; empty: every token is a step. With
    an environment or tools, by default, steps are the model's turns."""
    table_every: int = Field(100, ge=0)
    """Steps between tables of sample completions, which are also saved as rollouts; 0: neither."""

    kl_in_loss: ClassVar[bool] = True
    """Its loss can have a KL term."""

    @property
    def needs_reference(self) -> bool:
        """Log-probabilities of the reference are computed."""
        return self.kl.beta > 0

    @property
    def needs_rewards(self) -> bool:
        """It learns nothing without rewards of its own."""
        return self.rows() is not DataRole.recorded

    @property
    def rewards_count(self) -> bool:
        """Rewards are learned from, and not only logged."""
        return True

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of every stage that trains, of the KL and of sampling."""
        yield from super().rules(where, earlier)
        yield from earlier.no_policy(self.reference, f"{where}.reference", ("start", "base"))
        yield from self._kl_problems(f"{where}.kl")
        yield from self._opponent_problems(where, earlier)
        yield from tool_problems(self.tools, self.environment, self.max_turns, where)
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(self.sampling, name) != neutral:
                yield (
                    f"{where}.sampling.{name}: {self.kind} samples from the whole distribution: a filtered sampler "
                    f"and the trainer would differ - use {neutral:g} (pairs and evaluation may)"
                )
        if self.num_minibatches > self.prompts_per_step:
            yield (
                f"{where}.num_minibatches: {self.num_minibatches} for {self.prompts_per_step} prompts - "
                "at most one minibatch a prompt"
            )
        if self.sampling.max_new_tokens >= self.max_length:
            yield (
                f"{where}.max_length: {self.max_length} leaves no room for a prompt beside "
                f"sampling.max_new_tokens={self.sampling.max_new_tokens} - raise it, or lower that"
            )
        if self.rewards or self.needs_rewards:
            yield from reward_problems(self.rewards, where, earlier)
        if self.rows() is not DataRole.recorded:
            yield from environment_problems(self.rewards, self.environment, where)
        if self.step_end is not None and is_class(self.environment):
            yield f"{where}.step_end: the environment rewards turns, which are the steps then - remove it"
        if self._staleness(earlier):
            for leaf, place in reward_leaves(self.rewards, where):
                if leaf.model is not None and OF_FILE.fullmatch(leaf.fn):
                    yield (
                        f"{place}.model: {leaf.called} would run beside training in its process, and might draw from "
                        "the random generators that training draws from - set rollouts.staleness=0"
                    )

    def _opponent_problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        if self.opponents is None:
            return
        here = f"{where}.opponents"
        if not has_second_player(self.environment):
            yield f"{here}: there is no second player - name an environment with `other` and `step_other`, or remove it"
        chosen = self.rollouts or earlier.rollouts
        if chosen.engine != LOCAL or chosen.staleness:
            engine = "rollouts.staleness" if chosen.engine == LOCAL else f"rollouts.engine={chosen.engine}"
            yield (
                f"{here}: past versions are sampled by the local engine with the weights in this process, and not with "
                f"{engine} - use engine: local and staleness: 0"
            )

    def against_problems(self, where: str, earlier: Earlier) -> Iterator[str]:
        """What is wrong with a stage that has `against`."""
        chosen = self.rollouts or earlier.rollouts
        if chosen.engine != LOCAL or chosen.staleness:
            engine = "rollouts.staleness" if chosen.engine == LOCAL else f"rollouts.engine={chosen.engine}"
            yield (
                f"{where}.against: the local engine reads the reference's logits for every token, which is not done "
                f"with {engine} - use engine: local and staleness: 0"
            )
        answered = "tools" if self.tools else "environment" if self.environment is not None else None
        if answered:
            yield f"{where}.against: completions of a single turn are compared - remove it, or {where}.{answered}"

    def _staleness(self, earlier: Earlier) -> int:
        """Steps by which its samples are ahead of training."""
        if self.rows() is DataRole.recorded:
            return 0
        return (self.rollouts or earlier.rollouts).staleness

    def _length_problems(self, where: str) -> Iterator[str]:
        if self.epochs is not None:
            yield f"{where}.epochs: {self.kind} counts steps - give `{where}.steps` instead"
        if self.steps is None:
            yield f"{where}.steps: missing - how many rollout steps to take"

    def _kl_problems(self, where: str) -> Iterator[str]:
        kl = self.kl
        if kl.placement == KlPlacement.loss and kl.estimator == KlEstimator.k1:
            yield (
                f"{where}.estimator: k1 in the loss has an expected gradient of zero: it adds noise only - "
                "use placement: reward, or k2 or k3"
            )
        if kl.placement == KlPlacement.reward and kl.estimator == KlEstimator.k3_weighted:
            yield f"{where}.estimator: k3_weighted is a term of the loss - use k1, or placement: loss"
        if kl.placement == KlPlacement.loss and not self.kl_in_loss:
            yield f"{where}.placement: {self.kind} has no KL term in its loss - use placement: reward"
        if kl.target is not None and kl.beta == 0:
            yield f"{where}.beta: 0 stays 0 whatever the target - give beta a start, like 0.05"

    def warnings(self, where: str, model: Model) -> Iterator[str]:
        """Of an estimator of the KL that is biased where it stands."""
        yield from super().warnings(where, model)
        kl = self.kl
        if kl.placement == KlPlacement.reward and kl.estimator != KlEstimator.k1 and kl.beta > 0:
            yield f"{where}.kl.estimator: {kl.estimator.value} in the reward is biased - k1 is exact"
