"""DPO on pairs of fresh samples: the best and the worst of each group by reward (Guo et al. 2024, arXiv:2402.04792).

Or of the policy and another one, with XPO's bonus for exploring (Xie et al. 2024, arXiv:2405.21046).

Axes: P prompts of a step, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlpost.objectives.online import exploration
from rlpost.policy.logprobs import PolicyOutput
from rlpost.policy.reference import Reference
from rlpost.recipe.specs.online_dpo import OnlineDpo
from rlpost.stages.context import Context
from rlpost.stages.meeting import Meeting, Met
from rlpost.stages.on_policy import on_policy, updates_of
from rlpost.stages.pairwise import PairObjective, loss_of
from rlpost.stages.rollouts import Rollout, Sampler
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction
from rlpost.types import Group


def online_dpo(context: Context, cfg: OnlineDpo) -> Path:
    """Train on pairs that the policy has just sampled; returns the final checkpoint."""
    policy = context.policy()
    reference = context.reference(policy, cfg.reference)
    samples = Sampler(context, cfg, policy) if cfg.against is None else Meeting(context, cfg, policy, reference)
    objective = PairObjective(loss_of(context, cfg), temperature=cfg.sampling.temperature)
    learner = context.learner(policy, cfg, updates_of(context, cfg, samples), whole_groups=True)
    loss = exploring(objective.loss(), cfg.explore)

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
    if isinstance(rollout, Met):
        pairs, met = pairs_of_two(rollout, cfg.min_gap)
    else:
        pairs, met = best_and_worst(rollout.groups, rollout.reward_PG, cfg.min_gap), []
    found = Experience(tuple(pairs)).with_actions(reference=reference.logprobs(pairs, cfg.sampling.temperature))
    return found.with_actions(met=found.rows.spread(torch.tensor(met, dtype=torch.bool))) if cfg.explore else found


def pairs_of_two(rollout: Met, min_gap: float) -> tuple[list[Group], list[bool]]:
    """A pair of each completion of the policy and one of whom it met, the better one first.

    Where rewards differ by no more than `min_gap`, or both are the same tokens, there is none; nor where one is
    unscored.

    Returns:
        The pairs, and for each of their completions whether it is the other policy's.
    """
    pairs: list[Group] = []
    met: list[bool] = []
    rewards = zip(rollout.reward_PG.tolist(), rollout.others.reward_PG.tolist(), strict=True)
    for group, other, (own_G, met_G) in zip(rollout.groups, rollout.others.groups, rewards, strict=True):
        for both in zip(group.completions, other.completions, own_G, met_G, strict=True):
            own, theirs, reward, their_reward = both
            # Of a reward that is not a number, no gap is larger than the smallest.
            if abs(reward - their_reward) > min_gap and not np.array_equal(own.ids, theirs.ids):
                won = reward > their_reward
                pairs.append(replace(group, completions=(own, theirs) if won else (theirs, own)))
                met += [not won, won]
    return pairs, met


def exploring(loss: LossFunction, alpha: float) -> LossFunction:
    """The loss of pairs, and α·log π of the other policy's completion of each; without α the loss alone."""

    def whole(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        total, metrics = loss(output, part)
        rows = part.rows.to(output.logp_N.device)
        met_P = rows.sum(exploration(output.logp_N, part["met"])).view(-1, 2).sum(1)
        return total + alpha * (met_P * part["pair_weight"]).sum(), {**metrics, "met_logp": met_P.detach()}

    return whole if alpha else loss


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
