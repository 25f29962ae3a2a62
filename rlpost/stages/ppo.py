"""Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv:1707.06347) on generated text.

The state of a token is everything before it; the critic gives its value, generalised advantage estimation the
advantage, and KL to the reference is part of each action's reward (Ziegler et al. 2019, arXiv:1909.08593). Policy
and critic are trained at the same time, each by its own learner. Tokens that an environment writes are not actions:
the estimator skips them, so credit passes across turns. With `credit: turn` all of this is of turns instead of tokens.

Axes: N action tokens, S completions, K steps (turns) of all completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlpost.objectives import metrics
from rlpost.objectives.advantages import whiten
from rlpost.objectives.credit import gae, on_last
from rlpost.objectives.turns import turn_gae
from rlpost.objectives.values import value_loss
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.policy.value_head import ValueHeadModel, Values, make_critic
from rlpost.recipe.specs.ppo import Ppo
from rlpost.stages.advantage import step_rewards, steps_in
from rlpost.stages.context import Context
from rlpost.stages.entropy import EntropyBonus
from rlpost.stages.off_policy import SamplerCorrection
from rlpost.stages.on_policy import KlPenalty, clip_of, on_policy, surrogate_metrics, updates_of, weighted
from rlpost.stages.params import CreditUnit, OnTruncation, Trunk
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
    bonus = EntropyBonus(cfg)
    policy_loss = surrogate_loss(context.function(cfg, "loss"), cfg, kl, bonus)
    critic_loss = critic_loss_of(cfg)
    stats = LogitStats(temperature=cfg.sampling.temperature, entropy=bonus.wanted)
    updates = updates_of(context, cfg, samples)
    learner = context.learner(policy, cfg, updates)
    value_learner = context.learner(critic, cfg, updates, learning_rate=cfg.critic.learning_rate)

    def measured(rollout: Rollout, step: int) -> Experience:
        warming_up = step < cfg.critic.warmup_steps  # no bonus could raise the entropy then
        if not warming_up:
            bonus.measure(rollout)
        return assemble(rollout, cfg, correction, critic, kl)

    def minimise(minibatch: Experience, step: int) -> dict[str, float]:
        minibatch = weighted(minibatch, cfg)
        line = _critic_metrics(value_learner.update(critic_loss, valued(minibatch)))
        if step >= cfg.critic.warmup_steps:
            line |= learner.update(policy_loss, minibatch, stats)
        return line

    return on_policy(
        context,
        cfg,
        policy,
        samples,
        assemble=measured,
        minimise=minimise,
        observe=lambda experience: kl.observe(experience) | bonus.metrics,
        learners={"policy": learner, "critic": value_learner},
        states={"beta": kl, **bonus.states},
        live=("reward", "explained_variance"),
    )


def assemble(
    rollout: Rollout, cfg: Ppo, correction: SamplerCorrection, critic: ValueHeadModel, kl: KlPenalty
) -> Experience:
    """The samples with advantages and returns under the current critic."""
    experience = kl.with_reference(correction.of(rollout.experience), cfg.sampling.temperature)
    values, steps = critic.score(experience.groups), steps_in(experience.groups)
    reward_K, penalty_N = step_rewards(rollout, steps), kl.per_action(experience)
    old_N, bootstrap_S = values.before_N, _bootstrap_values(values, experience.groups, cfg)
    estimate = {"gamma": cfg.gamma, "gae_lambda": cfg.gae_lambda}
    if cfg.credit is CreditUnit.turn:
        # A turn pays for the KL of all its tokens; to a token, that of those before it is settled, as a baseline is.
        reward_K = reward_K - steps.rows_K.sum(penalty_N)
        old_K = old_N[steps.first_K]
        advantage_N, return_K = turn_gae(reward_K, old_K.to(reward_K.dtype), steps, bootstrap_S=bootstrap_S, **estimate)
        old_N, return_N = steps.spread(old_K), steps.spread(return_K)
        first_N = torch.zeros_like(experience["old_logp"]).index_fill(0, steps.first_K, 1.0)
        experience = experience.with_actions(turn_start=first_N)
    else:
        reward_N = on_last(reward_K, steps) - penalty_N
        advantage_N, return_N = gae(
            reward_N, old_N.to(reward_N.dtype), experience.rows, bootstrap_S=bootstrap_S, **estimate
        )
    if cfg.whiten:
        advantage_N = whiten(advantage_N)
    dtype = experience["old_logp"].dtype
    return experience.with_actions(advantage=advantage_N.to(dtype), returns=return_N.to(dtype), old_value=old_N)


def valued(minibatch: Experience) -> Experience:
    """The minibatch as the critic learns from it: with turns as its actions, where each begins, all alike."""
    if "turn_start" not in minibatch.per_action:
        return minibatch
    first_N = minibatch["turn_start"].double()
    return minibatch.with_actions(weight=first_N / first_N.sum().clamp(min=1))


def surrogate_loss(surrogate: Callable[..., Tensor], cfg: Ppo, kl: KlPenalty, bonus: EntropyBonus) -> LossFunction:
    """Σ surrogate·weight, less the entropy bonus."""

    clip = clip_of(surrogate, cfg.loss)

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        rows = part.rows.to(output.logp_N.device)
        loss_N = surrogate(output.logp_N, part["old_logp"], part["advantage"], rows)
        if "correction" in part.per_action:
            loss_N = loss_N * part["correction"]
        total = (loss_N * part["weight"]).sum()
        if output.entropy_N is not None:
            total = total - bonus.weight * (output.entropy_N * part["token_weight"]).sum()
        return total, surrogate_metrics(output, part, clip) | kl.metrics(output.logp_N, part)

    return loss


def critic_loss_of(cfg: Ppo) -> LossFunction:
    """Σ value loss·weight, with the policy's weights (of turns: see `valued`); its metrics hold the parts of the
    explained variance, means over tokens, each with its turn's value and return where turns are credited."""

    def loss(values: Values, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        value_N = values.before_N
        if "turn_start" in part.per_action:
            # The value at the first token of each token's turn, by indices that no device waits for.
            at_N = torch.arange(len(value_N), device=value_N.device) * (part["turn_start"] > 0)
            value_N = value_N[at_N.cummax(0).values]
        loss_N = value_loss(value_N, part["returns"], part["old_value"], clip=cfg.critic.clip)
        line = {"value": value_N.detach()}
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
