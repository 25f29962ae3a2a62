"""Reinforcement learning from groups of samples: GRPO (Shao et al. 2024, arXiv:2402.03300) and its relatives.

The advantage, the surrogate, the weight and the KL are the recipe's, so one stage holds REINFORCE with its
baselines, RLOO, GRPO, Dr. GRPO, DAPO, GSPO, CISPO, VinePPO and what lies between.

Axes: N action tokens, S completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rlpost.objectives.advantages import whiten
from rlpost.objectives.kl import kl_from_old
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.recipe.specs.grpo import Grpo
from rlpost.stages.advantage import AdvantageEstimator
from rlpost.stages.context import Context
from rlpost.stages.coupling import coupling, loss_of
from rlpost.stages.entropy import EntropyBonus
from rlpost.stages.expert import ExpertRows
from rlpost.stages.focus import focusing
from rlpost.stages.meeting import Meeting, contested
from rlpost.stages.off_policy import SamplerCorrection
from rlpost.stages.on_policy import KlPenalty, clip_of, on_policy, surrogate_metrics, updates_of, weighted
from rlpost.stages.replies import with_replies
from rlpost.stages.rollouts import Rollout, samples_of
from rlpost.train.experience import Experience
from rlpost.train.learner import LossFunction, Term
from rlpost.train.loop import Stateful


def grpo(context: Context, cfg: Grpo) -> Path:
    """Train on sampled completions and their rewards; returns the final checkpoint."""
    policy = context.policy()
    asked = cfg.needs_reference or cfg.against is not None
    reference = context.reference(policy, cfg.reference) if asked else None
    samples = samples_of(context, cfg, policy) if cfg.against is None else Meeting(context, cfg, policy, reference)
    correction = SamplerCorrection(context, cfg, policy)
    estimator = AdvantageEstimator(context, cfg, policy, samples)
    kl = KlPenalty(cfg.kl, reference if cfg.needs_reference else None)
    bonus, surrogate = EntropyBonus(cfg), context.function(cfg, "loss")
    loss = surrogate_loss(surrogate, cfg, kl, bonus)
    stats = LogitStats(temperature=cfg.sampling.temperature, entropy=bonus.wanted)
    learner = context.learner(policy, cfg, updates_of(context, cfg, samples))
    focused, coupled = focusing(context, cfg, learner), coupling(surrogate, cfg, learner)
    expert = None if cfg.expert is None else ExpertRows(context, cfg, cfg.expert, policy)
    states: dict[str, Stateful] = {"beta": kl, "baseline": estimator, **bonus.states}

    def minimise(minibatch: Experience, step: int) -> dict[str, float]:
        update = coupled(weighted(focused(minibatch), cfg))
        own = Term(loss, update, stats)
        if cfg.reply_coef:
            own = with_replies(own, cfg.reply_coef, policy.tokenizer)
        if expert is None:
            return learner.update(own.loss, own.experience, stats)
        return expert.update(learner, own, step)

    def measured(rollout: Rollout, step: int) -> Experience:
        bonus.measure(rollout)
        return assemble(contested(rollout, cfg.against), step, cfg, correction, estimator, kl)

    return on_policy(
        context,
        cfg,
        policy,
        samples,
        assemble=measured,
        minimise=minimise,
        observe=lambda experience: kl.observe(experience) | bonus.metrics,
        learners={"policy": learner},
        states=states if expert is None else {**states, "expert": expert},
        live=("reward", "length", "entropy"),
    )


def assemble(
    rollout: Rollout,
    step: int,
    cfg: Grpo,
    correction: SamplerCorrection,
    estimator: AdvantageEstimator,
    kl: KlPenalty,
) -> Experience:
    """The samples with the advantage of every action, less the KL penalty."""
    experience = correction.of(rollout.experience)
    experience = kl.with_reference(experience, cfg.sampling.temperature)
    advantage_N = estimator.advantage(rollout, experience, step) - kl.to_go(experience, cfg.group_size)
    if cfg.whiten:
        advantage_N = whiten(advantage_N)
    experience = experience.with_actions(advantage=advantage_N.to(experience["old_logp"].dtype))
    if kl.in_loss or not cfg.vanishes_without_advantage:
        return experience
    moves_S = experience.rows.sum(advantage_N.abs()) != 0
    return replace(experience, needed_S=tuple(moves_S.tolist()))


def surrogate_loss(surrogate: Callable[..., Tensor], cfg: Grpo, kl: KlPenalty, bonus: EntropyBonus) -> LossFunction:
    """Σ weight·(surrogate + KL to the sampler + β·KL, where each belongs in the loss), less the entropy bonus."""

    clip = clip_of(surrogate, cfg.loss)

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        rows = part.rows.to(output.logp_N.device)
        loss_N, more = loss_of(surrogate, output.logp_N, part, rows), {}
        if cfg.old_kl is not None:
            old_kl_N = kl_from_old(output.logp_N, part["old_logp"], estimator=cfg.old_kl.estimator.value)
            loss_N, more = loss_N + part["old_kl"] * old_kl_N, {"old_kl": old_kl_N.detach()}
        if kl.in_loss:
            loss_N = loss_N + kl.loss(output.logp_N, part)
        total = (loss_N * part["weight"]).sum()
        if output.entropy_N is not None:
            total = total - bonus.weight * (output.entropy_N * part["token_weight"]).sum()
        return total, surrogate_metrics(output, part, clip) | kl.metrics(output.logp_N, part) | more

    return loss
