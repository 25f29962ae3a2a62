"""Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv:1707.06347) on generated text.

The state of a token is everything before it; the critic gives its value, generalised advantage estimation the
advantage, and KL to the reference is part of each action's reward (Ziegler et al. 2019, arXiv:1909.08593). Policy
and critic are trained at the same time, each by its own learner. Tokens that an environment writes are not actions:
the estimator skips them, so credit passes across turns.

Axes: N action tokens, S completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlpost.objectives import metrics
from rlpost.objectives.advantages import whiten
from rlpost.objectives.credit import gae, reward_on_last_action
from rlpost.objectives.values import value_loss
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.policy.value_head import ValueHeadModel, Values, make_critic
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages.context import Context
from rlpost.stages.off_policy import SamplerCorrection
from rlpost.stages.on_policy import KlPenalty, clip_of, on_policy, surrogate_metrics, updates_of, weighted
from rlpost.stages.params import OnTruncation, Trunk
from rlpost.stages.rollouts import Rollout, Sampler
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction
from rlpost.types import Group, completions


def ppo(context: Context, cfg: Ppo) -> Path:
    """Train policy and critic on sampled completions and their rewards; returns the policy's final checkpoint."""
    policy = context.policy()
    critic_start = context.checkpoint(cfg.critic.start) if cfg.critic.start else None
    critic = make_critic(policy, context.start, critic_start, context.model, trains_trunk=cfg.critic.trunk is Trunk.own)
    kl = KlPenalty(cfg.kl, context.reference(policy, cfg.reference) if cfg.kl.beta else None)
    samples = Sampler(context, cfg, policy)
    correction = SamplerCorrection(context, cfg, policy)
    policy_loss = surrogate_loss(context.function(cfg, "loss"), cfg, kl)
    critic_loss = critic_loss_of(cfg)
    stats = LogitStats(temperature=cfg.sampling.temperature, entropy=cfg.entropy_coef > 0)
    updates = updates_of(context, cfg, samples)
    learner = context.learner(policy, cfg, updates)
    value_learner = context.learner(critic, cfg, updates, learning_rate=cfg.critic.learning_rate)

    def minimise(minibatch: Experience, step: int) -> dict[str, float]:
        minibatch = weighted(minibatch, cfg)
        line = _critic_metrics(value_learner.update(critic_loss, minibatch))
        if step >= cfg.critic.warmup_steps:
            line |= learner.update(policy_loss, minibatch, stats)
        return line

    return on_policy(
        context,
        cfg,
        policy,
        samples,
        assemble=lambda rollout, _: assemble(rollout, cfg, correction, critic, kl),
        minimise=minimise,
        observe=kl.observe,
        learners={"policy": learner, "critic": value_learner},
        states={"beta": kl},
        live=("reward", "explained_variance"),
    )


def assemble(
    rollout: Rollout, cfg: Ppo, correction: SamplerCorrection, critic: ValueHeadModel, kl: KlPenalty
) -> Experience:
    """The samples with advantages and returns under the current critic."""
    experience = kl.with_reference(correction.of(rollout.experience), cfg.sampling.temperature)
    rows, values = experience.rows, critic.score(experience.groups)
    reward_N = reward_on_last_action(rollout.reward_S, rows) - kl.per_action(experience)
    advantage_N, return_N = gae(
        reward_N,
        values.before_N.to(reward_N.dtype),
        rows,
        gamma=cfg.gamma,
        gae_lambda=cfg.gae_lambda,
        bootstrap_S=_bootstrap_values(values, experience.groups, cfg),
    )
    if cfg.whiten:
        advantage_N = whiten(advantage_N)
    dtype = experience["old_logp"].dtype
    return experience.with_actions(
        advantage=advantage_N.to(dtype), returns=return_N.to(dtype), old_value=values.before_N
    )


def surrogate_loss(surrogate: Callable[..., Tensor], cfg: Ppo, kl: KlPenalty) -> LossFunction:
    """Σ surrogate·weight, less the entropy bonus."""

    clip = clip_of(surrogate, cfg.loss)

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        rows = part.rows.to(output.logp_N.device)
        loss_N = surrogate(output.logp_N, part["old_logp"], part["advantage"], rows)
        if "correction" in part.per_action:
            loss_N = loss_N * part["correction"]
        total = (loss_N * part["weight"]).sum()
        if output.entropy_N is not None:
            total = total - cfg.entropy_coef * (output.entropy_N * part["token_weight"]).sum()
        return total, surrogate_metrics(output, part, clip) | kl.metrics(output.logp_N, part)

    return loss


def critic_loss_of(cfg: Ppo) -> LossFunction:
    """Σ value loss·weight, with the policy's weights; its metrics hold the parts of the explained variance."""

    def loss(values: Values, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        loss_N = value_loss(values.before_N, part["returns"], part["old_value"], clip=cfg.critic.clip)
        line = {"value": values.before_N.detach()}
        line |= metrics.explained_variance_parts(part["old_value"], part["returns"])
        return (loss_N * part["weight"]).sum(), line

    return loss


def _bootstrap_values(values: Values, groups: Sequence[Group], cfg: Ppo) -> Tensor | None:
    """[S] the critic's value after truncated completions, 0 after others; None where truncation counts as an end."""
    if cfg.on_truncation is OnTruncation.terminate:
        return None
    cut_S = torch.tensor([c.finish == "length" for c in completions(groups)])
    return torch.where(cut_S, values.final_S, 0.0)


def _critic_metrics(line: dict[str, float]) -> dict[str, float]:
    """The critic's metrics, by names that do not collide with the policy's."""
    own = {"loss": "value_loss", "grad_norm": "critic_grad_norm", "learning_rate": "critic_learning_rate"}
    return {own.get(name, name): x for name, x in metrics.without_parts(line).items()}
