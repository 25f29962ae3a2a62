"""DPO on pairs of fresh samples: the best and the worst of each group by reward (Guo et al. 2024, arXiv:2402.04792).

Axes: P prompts of a step, G completions a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from rlpost.recipe.specs.online_dpo import OnlineDpo
from rlpost.stages.context import Context, steps_of
from rlpost.stages.pairwise import PairObjective
from rlpost.stages.rollouts import Sampler, mean_of
from rlpost.train.experience import Experience
from rlpost.train.loop import show_samples
from rlpost.types import Group


def online_dpo(context: Context, cfg: OnlineDpo) -> Path:
    """Train on pairs that the policy has just sampled; returns the final checkpoint."""
    policy = context.policy()
    samples = Sampler(context, cfg, policy)
    objective = PairObjective(context.function(cfg, "loss"))
    reference = context.reference(policy, cfg.reference)
    steps = steps_of(cfg, samples.data.epoch_length, cfg.prompts, f"stages.{context.name}")
    learner = context.learner(policy, cfg, updates=steps * cfg.updates * cfg.passes, whole_groups=True)
    loop = context.loop(cfg, {"data": samples.data}, steps, policy=learner)
    loss = objective.loss()

    for step in loop.steps():
        rollout = samples.sample(step)
        pairs = best_and_worst(rollout.groups, rollout.reward_PG, cfg.min_gap)
        temperature = cfg.sampling.temperature
        experience = Experience(tuple(pairs)).with_actions(reference=reference.logprobs(pairs, temperature))
        updates = [
            learner.update(loss, objective.prepared(update, learner), temperature=temperature)
            for number in range(cfg.passes)
            for update in experience.split(cfg.updates, seed=context.seed_for("split", step * cfg.passes + number))
        ]
        line = rollout.metrics | {"pairs": len(pairs)} | mean_of(updates)
        loop.log(step, line, live=("reward", "accuracy", "pairs"))
        if cfg.table_every and (step == 0 or (step + 1) % cfg.table_every == 0):
            loop.rollouts(step, rollout.groups)
            show_samples(step, rollout.groups, policy.tokenizer)
    return context.finish(policy, cfg.kind, steps)


def best_and_worst(groups: Sequence[Group], reward_PG: Tensor, min_gap: float) -> list[Group]:
    """A pair of each group, the best first; groups whose best and worst differ by no more than `min_gap` give none.

    Nor do groups whose best and worst are the same tokens: what a reward finds to choose in them is noise.
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
