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
from rlpost.objectives.kl import full_kl
from rlpost.objectives.surrogates import ratio
from rlpost.objectives.trust_region import conjugate_gradient, finite_difference, line_search, step_length
from rlpost.objectives.weights import token_mean, weigh
from rlpost.policy.batch import Batch
from rlpost.policy.logprobs import Reader
from rlpost.policy.policy import Policy, Scores
from rlpost.recipe.specs.trpo import Trpo
from rlpost.stages.advantage import Estimator
from rlpost.stages.context import Context, steps_of
from rlpost.stages.rollouts import Beta, mean_of, samples_of
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.train.loop import show_samples

MOST_NUMBERS = 1 << 28
"""Log-probabilities of whole distributions that are kept for a step: a gigabyte."""


def trpo(context: Context, cfg: Trpo) -> Path:
    """Train on sampled completions and their rewards; returns the final checkpoint."""
    policy = context.policy()
    samples = samples_of(context, cfg, policy)
    # Actions without an advantage count too: the trust region is over all states visited.
    estimator = Estimator(context, cfg, policy, samples, sparse=False)
    beta = Beta(cfg.kl)
    steps = steps_of(cfg, samples.data.epoch_length, cfg.prompts, f"stages.{context.name}")
    learner = context.learner(policy, cfg, updates=steps * cfg.updates * cfg.passes)
    loop = context.loop(cfg, {"data": samples.data, "beta": beta, "baseline": estimator}, steps, policy=learner)

    for step in loop.steps():
        rollout = samples.sample(step)
        experience = estimator.experience(rollout, step, beta.value, learner)
        lines = []
        for number in range(cfg.passes):
            for update in experience.split(cfg.updates, seed=context.seed_for("split", step * cfg.passes + number)):
                lines.append(trust_region_update(learner, policy, weighted(update, cfg, learner), cfg))
        loop.log(step, rollout.metrics | beta.seen(experience) | mean_of(lines), live=("reward", "kl_over_delta"))
        if cfg.table_every and (step == 0 or (step + 1) % cfg.table_every == 0):
            loop.rollouts(step, rollout.groups)
            show_samples(step, rollout.groups, policy.tokenizer)
    return context.finish(policy, cfg.kind, steps)


def trust_region_update(learner: Learner, policy: Policy, update: Experience, cfg: Trpo) -> dict[str, float]:
    """One step within the trust region, or none if no share of it improves; returns what was measured.

    Raises:
        DivergedError: if the gradient or a metric is not finite; nothing was changed then.
    """
    how = {"temperature": cfg.sampling.temperature, "read": _everything}
    update = update.with_actions(old_NV=_distributions(learner, policy, update, how))
    before = learner.flat_weights()
    here = learner.gradient(surrogate, update, **how)
    norm = learner.gradient_norm()
    learner.must_be_finite(here)
    gradient = -learner.flat_gradient()

    def divergence_gradient(offset: Tensor) -> Tensor:
        learner.set_weights(before + offset)
        learner.gradient(divergence, update, **how)
        return learner.flat_gradient()

    def fisher(v: Tensor) -> Tensor:
        return finite_difference(divergence_gradient, v)

    direction = conjugate_gradient(lambda v: fisher(v) + cfg.damping * v, gradient, iterations=cfg.iterations)
    longest = learner.rate * step_length(direction, fisher(direction), cfg.delta)

    def measure(share: float) -> tuple[float, float]:
        learner.set_weights(before + share * longest * direction)
        there = learner.measure(surrogate, update, **how)
        return here["loss"] - there["loss"], there["divergence"]

    share, improvement, kl = line_search(measure, cfg.delta, steps=cfg.backtracks)
    learner.set_weights(before + share * longest * direction)
    learner.updates += 1
    return {
        "loss": here["loss"],
        "improvement": improvement,
        "step_share": share,
        "step_kl": kl,
        "kl_over_delta": kl / cfg.delta,
        "grad_norm": float(norm),
    }


def surrogate(scores: Scores, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
    """−Σ r·A·weight (eq. 14), and the divergence from the policy that sampled."""
    loss_N = -ratio(scores.logp_N, part["old_logp"]) * part["advantage"]
    if "correction" in part.per_action:
        loss_N = loss_N * part["correction"]
    return (loss_N * part["weight"]).sum(), {"divergence": _divergence(scores, part).detach()}


def divergence(scores: Scores, part: Experience) -> tuple[Tensor, Mapping[str, Tensor]]:
    """KL(old || new), averaged over the actions of the update."""
    return (_divergence(scores, part) * part["token_weight"]).sum(), {}


def weighted(update: Experience, cfg: Trpo, learner: Learner) -> Experience:
    """The update with its weights, counted over all of it."""
    rows, totals = update.rows, learner.totals(update)
    weight_N = weigh(cfg.weight, rows, totals.actions, totals.completions, cfg.sampling.max_new_tokens)
    return update.with_actions(weight=weight_N, token_weight=token_mean(rows, totals.actions))


def _divergence(scores: Scores, part: Experience) -> Tensor:
    assert scores.read is not None
    return full_kl(part["old_NV"], scores.read)


def _distributions(learner: Learner, policy: Policy, update: Experience, how: Mapping[str, object]) -> Tensor:
    """[N, V] log-probabilities of the whole vocabulary under the policy as it is.

    Raises:
        ModelError: they are too many to keep.
    """
    size = update.rows.actions * policy.vocabulary
    if size > MOST_NUMBERS:
        raise ModelError(
            f"trpo keeps the whole distribution of every action of an update, {size:.2g} numbers here; "
            f"use fewer prompts or more updates, for at most {MOST_NUMBERS:.2g}"
        )
    return learner.look(lambda scores, _: scores.read, update, **how)


def _everything(batch: Batch) -> Reader:  # noqa: ARG001 - whatever the batch
    return lambda logp_nV, where: logp_nV  # noqa: ARG005
