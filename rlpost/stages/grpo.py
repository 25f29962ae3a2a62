"""Reinforcement learning from groups of samples: GRPO (Shao et al. 2024, arXiv:2402.03300) and its relatives.

The advantage, the surrogate, the weight and the KL are the recipe's, so one stage holds REINFORCE with its
baselines, RLOO, GRPO, Dr. GRPO, DAPO, GSPO, CISPO, VinePPO and what lies between.

Axes: N action tokens, S completions, P prompts of a step, G completions a prompt.
"""

from __future__ import annotations

from pathlib import Path

from rlpost.objectives import metrics
from rlpost.recipe.specs.grpo import Grpo
from rlpost.stages.advantage import Estimator
from rlpost.stages.context import Context, steps_of
from rlpost.stages.rollouts import Beta, mean_of, samples_of
from rlpost.stages.surrogate import surrogate_loss, weighted
from rlpost.train.loop import show_samples


def grpo(context: Context, cfg: Grpo) -> Path:
    """Train on sampled completions and their rewards; returns the final checkpoint."""
    policy = context.policy()
    samples = samples_of(context, cfg, policy)
    # What a user's own surrogate adds to the advantage is not known.
    estimator = Estimator(context, cfg, policy, samples, sparse=not (cfg.entropy or ":" in cfg.loss.fn))
    beta = Beta(cfg.kl)
    loss = surrogate_loss(context.function(cfg, "loss"), cfg, beta)
    steps = steps_of(cfg, samples.data.epoch_length, cfg.prompts, f"stages.{context.name}")
    learner = context.learner(policy, cfg, updates=steps * cfg.updates * cfg.passes)
    loop = context.loop(cfg, {"data": samples.data, "beta": beta, "baseline": estimator}, steps, policy=learner)

    for step in loop.steps():
        rollout = samples.sample(step)
        experience = estimator.experience(rollout, step, beta.value, learner)
        updates = [
            learner.update(
                loss, weighted(update, cfg, learner), temperature=cfg.sampling.temperature, entropy=cfg.entropy > 0
            )
            for number in range(cfg.passes)
            for update in experience.split(cfg.updates, seed=context.seed_for("split", step * cfg.passes + number))
        ]
        line = rollout.metrics | beta.seen(experience) | metrics.without_parts(mean_of(updates))
        loop.log(step, line, live=("reward", "length", "entropy"))
        if cfg.table_every and (step == 0 or (step + 1) % cfg.table_every == 0):
            loop.rollouts(step, rollout.groups)
            show_samples(step, rollout.groups, policy.tokenizer)
    return context.finish(policy, cfg.kind, steps)
