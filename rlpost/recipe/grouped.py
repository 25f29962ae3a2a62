"""What the stages with a baseline from groups have in a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from rlpost.data.params import DataRole
from rlpost.policy.params import Model
from rlpost.recipe.rules import Earlier
from rlpost.recipe.specs.common import Rollouts
from rlpost.section import Choice, Section
from rlpost.stages.params import Weight
from rlpost.usercode.params import Function, Lookup
from rlpost.usercode.signatures import info_of

ADVANTAGE = Lookup(
    "advantage",
    "rlpost.objectives.advantages",
    (
        *("reward_PG", "length_PG", "greedy_P", "reward_PGK", "weight_K", "running_mean"),
        *("reward_S", "reward_N", "rows", "steps", "step_reward_K", "value_K", "group_size"),
        *("anchor_K", "logp_N", "collision_N", "running_mean_P", "column_P"),
    ),
    by_name=True,
    some=True,
    returns="tensor",
)
SURROGATE = Lookup(
    "surrogate",
    "rlpost.objectives.surrogates",
    ("logp_N", "old_logp_N", "advantage_N", "rows"),
    returns="elements",
)
FOCUS = Lookup(
    "focus",
    "rlpost.objectives.focus",
    ("logp_N", "old_logp_N", "advantage_N", "entropy_N", "uniform_N"),
    by_name=True,
    some=True,
    returns="elements",
)


class OldKlEstimator(Choice):
    """Estimators of a token's KL(sampler || policy), with r = π(token)/π_old(token)."""

    k3 = "k3"
    """r − 1 − log r: its gradient is the KL's."""
    abs = "abs"
    """|log r|: as large a pull for small moves as for large ones, and no KL's gradient; as in verl."""


class OldKl(Section):
    """KL(sampler || policy) in the loss, of tokens that a function chooses (KL-Cov, arXiv:2505.22617)."""

    beta: float = Field(1.0, gt=0)
    """Coefficient."""
    focus: Annotated[Function | None, FOCUS] = None
    """How much each token counts; in `rlpost/objectives/focus.py`. All of them by default; a function takes a forward
    pass an update."""
    estimator: OldKlEstimator = OldKlEstimator.k3
    """Estimator of a token's KL."""


class Grouped(Rollouts):
    """What the stages with a baseline from groups have."""

    advantage: Annotated[Function, ADVANTAGE] = Field(default_factory=lambda: Function(fn="group_normalised"))
    """The advantage of a completion, or of its steps or actions; in `rlpost/objectives/`: `advantages.py`,
    `baselines.py`, `credit.py`, `turns.py`."""
    weight: Weight = Weight.token_mean
    """How much each token counts."""
    whiten: bool = False
    """Shift and scale the advantages of all tokens of a step to mean 0 and variance 1."""
    dynamic_sampling_rounds: int = Field(0, ge=0)
    """Rounds of further prompts drawn while there are groups without a signal (dynamic sampling)."""
    fresh_rollouts: int = Field(4, ge=1)
    """For `monte_carlo_values`: rollouts from the start of every step of a completion."""
    recorded: bool = False
    """Rows are rollouts that another policy made (`rollouts/*.jsonl` of a run): nothing is sampled."""

    @property
    def compares_completions(self) -> bool:
        """Its advantage compares the completions of a group with each other."""
        return info_of(self.advantage, ADVANTAGE).has("compares_completions")

    def rows(self) -> DataRole:
        """Prompts, or rollouts that another policy made."""
        return DataRole.recorded if self.recorded else DataRole.prompts

    def rules(self, where: str, earlier: Earlier) -> Iterator[str]:
        """Those of rollouts, and of what an advantage asks for."""
        yield from super().rules(where, earlier)
        answered = "tools" if self.tools else "environment" if self.environment is not None else None
        name, credit = self.advantage.called, info_of(self.advantage, ADVANTAGE)
        has_steps = self.step_end is not None or answered or self.recorded
        if credit.takes("steps", "step_reward_K", "anchor_K", "value_K") and not has_steps:
            yield (
                f"{where}.step_end: missing - {name} credits steps: give the text that ends one, or '' for every "
                "token, or an environment, whose turns are steps"
            )
        if self.recorded and answered:
            yield f"{where}.{answered}: recorded rollouts are over - remove it, or recorded"
        if self.recorded and (self.dynamic_sampling_rounds or credit.takes("greedy_P", "value_K")):
            what = "dynamic_sampling_rounds" if self.dynamic_sampling_rounds else f"advantage.fn={self.advantage.fn}"
            yield f"{where}.{what}: needs new samples, and recorded rollouts are all there is - remove one of the two"
        if credit.takes("running_mean_P", "column_P"):
            from rlpost.data.row_values import READS  # most recipes read no column, and are shown without it

            for argument, (asked, _) in READS.items():
                if credit.takes(asked) and not isinstance(self.advantage.args.get(argument), str):
                    yield f"{where}.advantage.args.{argument}: missing - {name} reads a column of the rows: name it"
        if answered and credit.takes("value_K"):
            yield f"{where}.{answered}: {name} goes on from inside a turn, alone - remove one of the two"
        if self._staleness(earlier) and credit.takes("greedy_P", "value_K"):
            yield (
                f"{where}.advantage.fn: {name} has more sampled with the weights that samples are learned with, and "
                "these are drawn ahead - set rollouts.staleness=0, or take another one"
            )
        if self.recorded and self.rollouts is not None and self.rollouts.staleness:
            yield f"{where}.rollouts.staleness: recorded rollouts are all there is - remove it"
        k = self.advantage.args.get("k") if credit.has("k_in_group") else None
        if isinstance(k, int) and not 1 <= k <= self.group_size:
            yield f"{where}.advantage.args.k: {k} - expected from 1 to group_size={self.group_size}"
        elif k is not None and self.group_size == 1:
            yield f"{where}.group_size: {name} compares completions - give at least 2"

    def warnings(self, where: str, model: Model) -> Iterator[str]:
        """Of a group that has nothing to compare."""
        yield from super().warnings(where, model)
        if self.group_size == 1 and self.compares_completions:
            yield (
                f"{where}.group_size: a group of one has no baseline: {self.advantage.called} is 0 everywhere "
                "and nothing is learned from it - use at least 2"
            )
