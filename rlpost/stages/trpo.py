"""Trust-region policy optimisation (Schulman et al. 2015, arXiv:1502.05477) from groups of samples.

The step is the natural gradient, as long as the trust region allows: KL(old || new), averaged over the actions
visited, stays within delta. Products with the Fisher matrix are finite differences of the KL's gradient, so that
nothing is differentiated twice.

Axes: N action tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlpost.errors import ModelError
from rlpost.objectives.advantages import whiten
from rlpost.objectives.kl import full_kl
from rlpost.objectives.surrogates import ratio
from rlpost.objectives.trust_region import conjugate_gradient, finite_difference, line_search, step_length
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.policy.policy import Policy
from rlpost.recipe.specs.trpo import Trpo
from rlpost.stages.advantage import AdvantageEstimator
from rlpost.stages.context import Context
from rlpost.stages.off_policy import SamplerCorrection
from rlpost.stages.on_policy import KlPenalty, on_policy, updates_of, weighted
from rlpost.stages.rollouts import Rollout, samples_of
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner

MOST_NUMBERS = 1 << 28
"""Log-probabilities of whole distributions that are kept for a step: a gigabyte."""


def trpo(context: Context, cfg: Trpo) -> Path:
    """Train on sampled completions and their rewards; returns the final checkpoint."""
    policy = context.policy()
    samples = samples_of(context, cfg, policy)
    correction = SamplerCorrection(context, cfg, policy)
    estimator = AdvantageEstimator(context, cfg, policy, samples)
    kl = KlPenalty(cfg.kl, context.reference(policy, cfg.reference) if cfg.kl.beta else None)
    learner = context.learner(policy, cfg, updates_of(context, cfg, samples))
    return on_policy(
        context,
        cfg,
        policy,
        samples,
        assemble=lambda rollout, step: assemble(rollout, step, cfg, correction, estimator, kl),
        minimise=lambda minibatch, _: trust_region_update(learner, policy, weighted(minibatch, cfg), cfg),
        observe=kl.observe,
        learners={"policy": learner},
        states={"beta": kl, "baseline": estimator},
        live=("reward", "kl_over_delta"),
    )


def assemble(
    rollout: Rollout,
    step: int,
    cfg: Trpo,
    correction: SamplerCorrection,
    estimator: AdvantageEstimator,
    kl: KlPenalty,
) -> Experience:
    """The samples with the advantage of every action, less the KL penalty.

    Actions without an advantage count too: the trust region is over all states visited.
    """
    experience = correction.of(rollout.experience)
    experience = kl.with_reference(experience, cfg.sampling.temperature)
    advantage_N = estimator.advantage(rollout, experience, step) - kl.to_go(experience, cfg.group_size)
    if cfg.whiten:
        advantage_N = whiten(advantage_N)
    return experience.with_actions(advantage=advantage_N.to(experience["old_logp"].dtype))


def trust_region_update(learner: Learner, policy: Policy, update: Experience, cfg: Trpo) -> dict[str, float]:
    """One step within the trust region, or none if no fraction of it improves; returns its metrics.

    Raises:
        DivergedError: if the gradient or a metric is not finite; nothing was changed then.
    """
    stats = LogitStats(temperature=cfg.sampling.temperature, distribution=True)
    update = update.with_actions(old_NV=_distributions(learner, policy, update, stats))
    before = learner.flat_weights()
    here = learner.gradient(surrogate, update, stats)
    norm = learner.gradient_norm()
    learner.must_be_finite(here)
    gradient = -learner.flat_gradient()

    def divergence_gradient(offset: Tensor) -> Tensor:
        learner.set_weights(before + offset)
        learner.gradient(divergence, update, stats)
        return learner.flat_gradient()

    def fisher(v: Tensor) -> Tensor:
        return finite_difference(divergence_gradient, v, dot=learner.dot)

    direction = conjugate_gradient(
        lambda v: fisher(v) + cfg.cg_damping * v, gradient, iterations=cfg.cg_iterations, dot=learner.dot
    )
    longest = learner.rate * step_length(direction, fisher(direction), cfg.max_kl, learner.dot)

    def measure(share: float) -> tuple[float, float]:
        learner.set_weights(before + share * longest * direction)
        there = learner.measure(surrogate, update, stats)
        return here["loss"] - there["loss"], there["divergence"]

    share, improvement, kl = line_search(measure, cfg.max_kl, steps=cfg.backtracks)
    learner.set_weights(before + share * longest * direction)
    learner.updates += 1
    return {
        "loss": here["loss"],
        "improvement": improvement,
        "step_share": share,
        "step_kl": kl,
        "kl_over_delta": kl / cfg.max_kl,
        "grad_norm": norm,
    }


def surrogate(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
    """−Σ r·A·weight (eq. 14), and the divergence from the policy that sampled."""
    loss_N = -ratio(output.logp_N, part["old_logp"]) * part["advantage"]
    if "correction" in part.per_action:
        loss_N = loss_N * part["correction"]
    return (loss_N * part["weight"]).sum(), {"divergence": _divergence(output, part).detach()}


def divergence(output: PolicyOutput, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
    """KL(old || new), averaged over the actions of the update."""
    return (_divergence(output, part) * part["token_weight"]).sum(), {}


def _divergence(output: PolicyOutput, part: Experience) -> Tensor:
    assert output.distribution_NV is not None
    return full_kl(part["old_NV"], output.distribution_NV)


def _distributions(learner: Learner, policy: Policy, update: Experience, stats: LogitStats) -> Tensor:
    """[N, V] log-probabilities of the whole vocabulary under the policy as it is.

    Raises:
        ModelError: they are too many to keep.
    """
    size = update.rows.actions * policy.vocabulary
    if size > MOST_NUMBERS:
        raise ModelError(
            f"trpo keeps the whole distribution of every action of an update, {size:.2g} numbers here; "
            f"use a lower prompts_per_step or a higher num_minibatches, for at most {MOST_NUMBERS:.2g}"
        )
    return learner.evaluate_no_grad(lambda output, _: output.distribution_NV, update, stats)
