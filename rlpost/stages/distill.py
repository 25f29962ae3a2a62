"""On-policy distillation: the student samples, and a teacher scores every token (GKD, Agarwal et al. 2023,
arXiv:2306.13649; MiniLLM, Gu et al. 2023, arXiv:2306.08543).

The loss of an action is the divergence of student and teacher in its state, over whole distributions. What that leaves
out, that actions decide which states follow, is a policy gradient beside it, as rewards are.

Axes: N action tokens of an update, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlpost.devices import moved
from rlpost.objectives.advantages import whiten
from rlpost.objectives.distillation import divergence_to_go, fold, top_tokens, with_others
from rlpost.objectives.kl import k1, kl_in_reward
from rlpost.policy.logprobs import DistributionLoss, LogitStats, PolicyOutput
from rlpost.recipe.specs.distill import Distill, Estimate, StateCredit
from rlpost.stages.advantage import AdvantageEstimator
from rlpost.stages.context import Context
from rlpost.stages.exclusion import excluding
from rlpost.stages.off_policy import SamplerCorrection
from rlpost.stages.on_policy import clip_of, on_policy, surrogate_metrics, updates_of, weighted
from rlpost.stages.rollouts import Rollout, Sampler
from rlpost.stages.teachers import Lessons, lessons_of
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction
from rlpost.types import FAILED

TOLD = {"ids": "ids_NK", "top": "top_NK", "teacher": "said_N"}
"""What an engine tells of actions, by its name in an experience -> the loss's."""


def distill(context: Context, cfg: Distill) -> Path:
    """Train on what a teacher makes of the student's samples; returns the final checkpoint."""
    policy = context.policy()
    lessons = lessons_of(context, cfg, policy)
    samples = Sampler(context, cfg, policy)
    lessons.check(samples.data)
    correction = SamplerCorrection(context, cfg, policy)
    estimator = AdvantageEstimator(context, cfg, policy, samples)
    divergence = Divergence(context.function(cfg, "loss"), cfg, lessons, policy.device)
    loss = distillation_loss(context.function(cfg, "surrogate"), cfg)
    learner = context.learner(policy, cfg, updates_of(context, cfg, samples))
    return on_policy(
        context,
        cfg,
        policy,
        samples,
        assemble=lambda rollout, step: assemble(
            lessons.begin(taught(rollout, cfg)), step, cfg, correction, estimator, divergence, learner
        ),
        minimise=lambda minibatch, _: learner.update(loss, weighted(minibatch, cfg), divergence.stats),
        observe=lambda _: {},
        learners={"policy": learner},
        states={"baseline": estimator},
        live=(*(("reward",) if cfg.rewards else ()), "divergence", "length", "entropy"),
    )


def taught(rollout: Rollout, cfg: Distill) -> Rollout:
    """The samples with all that a teacher can say something about: what rewards leave unscored, too, if none count."""
    if cfg.rewards_count:
        return rollout
    out = {FAILED, "length"} if cfg.mask_truncated else {FAILED}
    learned = excluding(rollout.groups, [[c.finish in out for c in g.completions] for g in rollout.groups])
    return replace(rollout, learned=learned)


def assemble(
    rollout: Rollout,
    step: int,
    cfg: Distill,
    correction: SamplerCorrection,
    estimator: AdvantageEstimator,
    divergence: Divergence,
    learner: Learner,
) -> Experience:
    """The samples, with the advantage of every action where there is more than each state's own divergence."""
    experience = divergence.read(correction.of(rollout.experience))
    if not cfg.has_advantages:
        return experience
    advantage_N = -divergence.to_come(experience, learner)
    if cfg.reward_coef:
        reward_N = estimator.advantage(rollout, experience, step)
        advantage_N = advantage_N + cfg.reward_coef * (whiten(reward_N) if cfg.whiten else reward_N)
    return experience.with_actions(advantage=advantage_N.to(experience["old_logp"].dtype))


class Divergence:
    """The divergence of student and teacher in each state, as the recipe has it."""

    def __init__(
        self, function: Callable[..., Tensor], cfg: Distill, lessons: Lessons, device: torch.device | str = "cpu"
    ) -> None:
        """Take `function` of two distributions, over the whole vocabulary or the teacher's likeliest tokens."""
        self._function = function
        self._lessons = lessons
        self._device = device
        self._temperature = cfg.sampling.temperature
        self._top_k = cfg.top_k
        self._group_size = cfg.group_size
        self._sampled = cfg.estimate is Estimate.sampled
        self._onward = cfg.credit is StateCredit.completion

    def stats(self, part: Experience) -> LogitStats:
        """What the student's pass over a part computes: `loss_N` is [N, 2], the divergence and the teacher's logp."""
        if self._sampled:
            return LogitStats(self._temperature)
        if self._lessons.is_loaded:
            teacher = self._lessons.distributions(part.groups, self._temperature)
            asks = frozenset(("logp_NV", "teacher_NV", "target_N"))
            return LogitStats(self._temperature, loss=DistributionLoss(self._whole, asks, teacher))
        told = {name: moved(part[key], self._device) for key, name in TOLD.items()}
        asks = frozenset(("logp_NV", *told))
        return LogitStats(self._temperature, loss=DistributionLoss(self._told, asks, more=told))

    def read(self, experience: Experience) -> Experience:
        """The experience with what is asked of the teacher once: of an engine, or about the sampled tokens alone."""
        if self._lessons.is_loaded and not self._sampled:
            return experience
        k = 0 if self._sampled else self._top_k or 0
        return experience.with_actions(**self._lessons.score(experience.groups, k, self._temperature))

    def to_come(self, experience: Experience, learner: Learner) -> Tensor:
        """[N] what the policy gradient charges each action with, besides its state's own divergence."""
        rows = experience.rows
        if self._sampled:
            old_N, teacher_N = experience["old_logp"], experience["teacher"]
            return kl_in_reward(old_N, teacher_N, rows, self._group_size) if self._onward else k1(old_N, teacher_N)
        if not self._onward:
            return torch.zeros_like(experience["old_logp"])
        divergence_N = learner.evaluate_no_grad(lambda output, _: output.loss_N[:, 0], experience, self.stats)
        return divergence_to_go(divergence_N, rows, self._group_size)

    def _whole(self, logp_NV: Tensor, teacher_NV: Tensor, target_N: Tensor) -> Tensor:
        said_N = teacher_NV.gather(-1, target_N[:, None])[:, 0]
        if self._top_k is not None:
            ids_NK, _ = top_tokens(teacher_NV, self._top_k)
            logp_NV, teacher_NV = fold(logp_NV, ids_NK), fold(teacher_NV, ids_NK)
        return torch.stack([self._function(logp_NV=logp_NV, teacher_NV=teacher_NV), said_N], 1)

    def _told(self, logp_NV: Tensor, ids_NK: Tensor, top_NK: Tensor, said_N: Tensor) -> Tensor:
        teacher_NV = with_others(top_NK.to(logp_NV.dtype))
        loss_N = self._function(logp_NV=fold(logp_NV, ids_NK), teacher_NV=teacher_NV)
        return torch.stack([loss_N, said_N.to(loss_N.dtype)], 1)


def distillation_loss(surrogate: Callable[..., Tensor], cfg: Distill) -> LossFunction:
    """Σ weight·(divergence + surrogate), whichever of the two there are."""
    clip = clip_of(surrogate, cfg.surrogate)

    def loss(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
        logp_N = output.logp_N
        if output.loss_N is None:
            loss_N, metrics = torch.zeros_like(logp_N), _apart(logp_N.detach(), part["teacher"])
        else:
            loss_N, said_N = output.loss_N.unbind(1)
            metrics = {"divergence": loss_N.detach(), "teacher_logp": said_N.detach()}
        if "advantage" in part.per_action:
            rows = part.rows.to(logp_N.device)
            loss_N = loss_N + surrogate(logp_N, part["old_logp"], part["advantage"], rows)
            metrics |= surrogate_metrics(output, part, clip)
        else:
            metrics["sampler_gap"] = (logp_N.detach() - part["sampled_logp"]).abs()
        if "correction" in part.per_action:
            loss_N = loss_N * part["correction"]
        return (loss_N * part["weight"]).sum(), metrics

    return loss


def _apart(logp_N: Tensor, teacher_N: Tensor) -> dict[str, Tensor]:
    """The divergence by sampled tokens, whose mean estimates KL(student || teacher)."""
    return {"divergence": k1(logp_N, teacher_N), "teacher_logp": teacher_N}
