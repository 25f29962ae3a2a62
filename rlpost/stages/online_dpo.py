"""DPO on pairs of fresh samples: the best and the worst of each group by reward (Guo et al. 2024, arXiv:2402.04792).

Axes: P prompts of a step, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from rlpost.policy.reference import Reference
from rlpost.recipe.specs.online_dpo import OnlineDpo
from rlpost.stages.context import Context
from rlpost.stages.on_policy import on_policy, updates_of
from rlpost.stages.pairwise import PairObjective, loss_of
from rlpost.stages.rollouts import Rollout, Sampler
from rlpost.train.experience import Experience
from rlpost.types import Group


def online_dpo(context: Context, cfg: OnlineDpo) -> Path:
    """Train on pairs that the policy has just sampled; returns the final checkpoint."""
    policy = context.policy()
    samples = Sampler(context, cfg, policy)
    objective = PairObjective(loss_of(context, cfg), temperature=cfg.sampling.temperature)
    reference = context.reference(policy, cfg.reference)
    learner = context.learner(policy, cfg, updates_of(context, cfg, samples), whole_groups=True)
    loss = objective.loss()

    return on_policy(
        context,
        cfg,
        policy,
        samples,
        assemble=lambda rollout, _: assemble(rollout, cfg, reference),
        minimise=lambda minibatch, _: learner.update(loss, objective.prepared(minibatch, learner), objective.stats),
        observe=lambda pairs: {"pairs": len(pairs.groups)},
        learners={"policy": learner},
        states={},
        live=("reward", "accuracy", "pairs"),
    )


def assemble(rollout: Rollout, cfg: OnlineDpo, reference: Reference) -> Experience:
    """The pairs that the samples give, with the reference's log-probabilities."""
    pairs = best_and_worst(rollout.groups, rollout.reward_PG, cfg.min_gap)
    return Experience(tuple(pairs)).with_actions(reference=reference.logprobs(pairs, cfg.sampling.temperature))


def best_and_worst(groups: Sequence[Group], reward_PG: Tensor, min_gap: float) -> list[Group]:
    """A pair of each group, the best first; groups whose best and worst differ by no more than `min_gap` give none.

    Nor do groups whose best and worst are the same tokens: a difference of their rewards is noise.
    """
    pairs = []
    for group, reward_G in zip(groups, reward_PG.tolist(), strict=True):
        scored = [i for i, reward in enumerate(reward_G) if reward == reward]
        if not scored:
            continue
        best, worst = max(scored, key=reward_G.__getitem__), min(scored, key=reward_G.__getitem__)
        chosen, rejected = group.completions[best], group.completions[worst]
        if reward_G[best] - reward_G[worst] > min_gap and not np.array_equal(chosen.ids, rejected.ids):
            pairs.append(replace(group, completions=(chosen, rejected)))
    return pairs
