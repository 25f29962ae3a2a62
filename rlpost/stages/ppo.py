"""Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv:1707.06347) on generated text.

The state of a token is everything before it; the critic gives its value, generalised advantage estimation the
advantage, and KL to the reference is part of each action's reward (Ziegler et al. 2019, arXiv:1909.08593). Policy
and critic are trained at the same time, each by its own learner. What an environment writes is no action: time
steps over it, so that credit is carried across turns.

Axes: N action tokens, S completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlpost.objectives import kl, metrics
from rlpost.objectives.advantages import whiten
from rlpost.objectives.credit import gae, place
from rlpost.objectives.values import value_loss
from rlpost.policy.reference import Reference
from rlpost.policy.scalar import ScalarModel, Values, critic_beside
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages.context import Context, steps_of
from rlpost.stages.params import AtLimit, Trunk
from rlpost.stages.rollouts import Beta, Rollout, Sampler, mean_of, sampled_logprobs, without_unscored
from rlpost.stages.surrogate import surrogate_loss, weighted
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction
from rlpost.train.loop import show_samples
from rlpost.types import Group, completions


def ppo(context: Context, cfg: Ppo) -> Path:
    """Train policy and critic on sampled completions and their rewards; returns the policy's final checkpoint."""
    policy = context.policy()
    scores = context.checkpoint(cfg.critic.start) if cfg.critic.start else None
    critic = critic_beside(policy, context.start, scores, context.model, trains_trunk=cfg.critic.trunk is Trunk.own)
    reference = context.reference(policy, cfg.reference) if cfg.kl.beta else None
    samples = Sampler(context, cfg, policy)
    beta = Beta(cfg.kl)
    losses = surrogate_loss(context.function(cfg, "loss"), cfg, beta), value_of(cfg)
    steps = steps_of(cfg, samples.data.epoch_length, cfg.prompts, f"stages.{context.name}")
    updates = steps * cfg.updates * cfg.passes
    learner = context.learner(policy, cfg, updates)
    value_learner = context.learner(critic, cfg, updates, learning_rate=cfg.critic.learning_rate)
    loop = context.loop(cfg, {"data": samples.data, "beta": beta}, steps, policy=learner, critic=value_learner)

    for step in loop.steps():
        rollout = samples.sample(step)
        experience = assemble(rollout, cfg, critic, reference, beta.value, learner)
        lines = []
        for number in range(cfg.passes):
            for update in experience.split(cfg.updates, seed=context.seed_for("split", step * cfg.passes + number)):
                update = weighted(update, cfg, learner)
                line = _critic_metrics(value_learner.update(losses[1], update))
                if step >= cfg.critic.warmup_steps:
                    line |= learner.update(
                        losses[0], update, temperature=cfg.sampling.temperature, entropy=cfg.entropy > 0
                    )
                lines.append(line)
        loop.log(step, rollout.metrics | beta.seen(experience) | mean_of(lines), live=("reward", "explained_variance"))
        if cfg.table_every and (step == 0 or (step + 1) % cfg.table_every == 0):
            loop.rollouts(step, rollout.groups)
            show_samples(step, rollout.groups, policy.tokenizer)
    return context.finish(policy, cfg.kind, steps)


def assemble(
    rollout: Rollout, cfg: Ppo, critic: ScalarModel, reference: Reference | None, beta: float, learner: Learner
) -> Experience:
    """What the step's updates learn from: advantages and returns under the critic as it is."""
    groups = without_unscored(rollout.groups, rollout.reward_PG)
    experience = Experience(tuple(groups))
    rows, old_N = experience.rows, sampled_logprobs(groups)
    reward_N = place(rollout.reward_PG.flatten().nan_to_num(), rows)
    values = {"old_logp": old_N, "sampled_logp": old_N}
    if reference is not None:
        values["reference"] = reference.logprobs(groups, cfg.sampling.temperature)
        reward_N = reward_N - beta * kl.k1(old_N, values["reference"])
    scored = critic.score(groups)
    advantage_N, return_N = gae(
        reward_N,
        scored.before_N.to(reward_N.dtype),
        rows,
        gamma=cfg.gamma,
        lam=cfg.lam,
        bootstrap_S=_beyond(scored, groups, cfg),
    )
    if cfg.whiten:
        everyone, own = learner.gather(advantage_N)
        advantage_N = whiten(everyone)[own]
    return experience.with_actions(
        advantage=advantage_N.to(old_N.dtype),
        returns=return_N.to(old_N.dtype),
        old_value=scored.before_N,
        **values,
    )


def value_of(cfg: Ppo) -> LossFunction:
    """Σ value loss·weight, with the policy's weights; and what explained variance is made of."""

    def loss(values: Values, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss_N = value_loss(values.before_N, part["returns"], part["old_value"], clip=cfg.critic.clip)
        line = {"value": values.before_N.detach()}
        line |= metrics.explained_variance_parts(part["old_value"], part["returns"])
        return (loss_N * part["weight"]).sum(), line

    return loss


def _beyond(scored: Values, groups: Sequence[Group], cfg: Ppo) -> Tensor | None:
    """[S] what the critic expects after the end of completions that were cut off; None if a cut is an end."""
    if cfg.at_limit is AtLimit.terminate:
        return None
    cut_S = torch.tensor([c.finish == "length" for c in completions(groups)])
    return torch.where(cut_S, scored.final_S, 0.0)


def _critic_metrics(line: dict[str, float]) -> dict[str, float]:
    """The critic's metrics by names that do not meet the policy's, what is made of several put together."""
    own = {"loss": "value_loss", "grad_norm": "critic_grad_norm", "learning_rate": "critic_learning_rate"}
    return {own.get(name, name): x for name, x in metrics.without_parts(line).items()}
