"""Samples of the policy, and as many of another one that it meets: its reference, or a mixture of the two.

The other one's completions continue the same prompts, are scored by the same rewards, and are compared with the
policy's; how, is the stage's business.

Axes: P prompts of a step, G completions of each policy to a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from rlpost.data.dataset import Dataset
from rlpost.engine.collect import collect
from rlpost.engine.mixture import ReferenceMixture
from rlpost.errors import RecipeError
from rlpost.objectives.online import preferred
from rlpost.policy.policy import Policy
from rlpost.policy.reference import Reference
from rlpost.recipe.specs.grpo import Grpo
from rlpost.recipe.specs.online_dpo import OnlineDpo
from rlpost.stages.context import Context
from rlpost.stages.exclusion import excluding
from rlpost.stages.params import Contest
from rlpost.stages.rollouts import Rollout, Sampler, rollout_of


@dataclass(frozen=True)
class Met(Rollout):
    """The policy's samples of a step, with those of whom it met."""

    others: Rollout = field(kw_only=True)
    """G completions of the other one to each of the same prompts."""

    @property
    def metrics(self) -> dict[str, float]:
        """Those of the policy's samples, and how often they were better; equal ones are half a win."""
        won_PG = preferred(self.reward_PG, self.others.reward_PG, preference="step")
        scored = won_PG[~won_PG.isnan()]
        wins = {"win_rate": float(scored.mean())} if len(scored) else {}
        return super().metrics | wins | {f"met/{n}": x for n, x in self.others.metrics.items() if n in _SHOWN}


_SHOWN = ("reward", "length", "unscored")


class Meeting:
    """A stage's samples, each step those of both policies."""

    def __init__(self, context: Context, cfg: Grpo | OnlineDpo, policy: Policy, reference: Reference | None) -> None:
        """Open the stage's prompts; nothing is sampled yet.

        Raises:
            RecipeError: the policy's weights are in shards.
        """
        assert cfg.against is not None, "the caller has seen to it"
        assert reference is not None, "it is part of whom the policy meets"
        if context.shards is not None:
            raise RecipeError(
                f"stages.{context.name}.against: the reference's logits are not read from weights in shards while the "
                "policy samples; remove it, or parallel.strategy"
            )
        self._context = context
        self._cfg = cfg
        self._policy = policy
        self._own = Sampler(context, cfg, policy)
        guide = ReferenceMixture(reference, cfg.against.share, cfg.sampling.temperature)
        self._engine = context.engine(policy, cfg.rollouts, guide)
        self._sampling = 0.0

    @property
    def data(self) -> Dataset:
        """The stage's rows."""
        return self._own.data

    @property
    def seconds(self) -> Mapping[str, float]:
        """Spent on sampling and on scoring so far, of both."""
        own = self._own.seconds
        return {"sampling": own["sampling"] + self._sampling, "scoring": own["scoring"]}

    def state(self) -> dict[str, Any]:
        """The position in the data."""
        return self._own.state()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from that position."""
        self._own.load(state)

    def sample(self, step: int) -> Met:
        """The step's samples, by the policy as it is; the other one answers the prompts that these are of."""
        rollout = self._own.sample(step)
        began = time.perf_counter()
        self._engine.update_weights(self._policy, step)
        cfg, seed = self._cfg, self._context.seed_for("met", step)
        groups = self._own.divided(collect(self._engine, rollout.groups, cfg.group_size, cfg.sampling, seed))
        self._sampling += time.perf_counter() - began
        others = rollout_of(groups, self._own.score(groups), self._own.scorer.weights, cfg.mask_truncated)
        return Met(**vars(rollout), others=others)


def contested(rollout: Rollout, contest: Contest | None) -> Rollout:
    """The samples with, in place of rewards, how likely each is preferred to what the other policy says.

    Where the other one has no completion with a reward, there is nothing to compare with, and nothing is learned.
    """
    if contest is None:
        return rollout
    assert isinstance(rollout, Met), "a stage with a contest meets another policy"
    won_PG: Tensor = preferred(
        rollout.reward_PG, rollout.others.reward_PG, preference=contest.preference.value, scale=contest.scale
    )
    return replace(rollout, learned=excluding(rollout.learned, won_PG.isnan().tolist()), reward_PG=won_PG)
