"""Claims about surrogates of whole completions: each follows an objective, which is differentiated as it stands.

Completions come from the reference b; W = π/b of a completion, A its advantage. A surrogate that weighs ∇log π by
A·φ(W) follows Σ b·A·f(W) with f′(W) = φ(W)/W. The objective is written down here and differentiated by the policy's
parameters, without a surrogate and without the score function.

Axes: L leaves, N actions of all leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlpost.objectives import focus, surrogates
from rlpost.objectives.kl import LIMIT
from rlpost.oracle import truth
from rlpost.oracle.claims_offpolicy import HIGH, LOW, Sampled
from rlpost.oracle.estimators import Surrogate, ascent
from rlpost.oracle.problem import Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact, skipped

UP, DOWN = (2.0, 3.0), (3.0, 2.0)
"""(k, λ) of sequence_soft, for advantages above and below 0."""
TAU = 0.7
Objective = Callable[[Tensor], Tensor]
"""[L] log W -> [L] what each completion of b adds, per unit of its probability."""


def completion_section(problem: Problem) -> Section:
    """Surrogates of a whole completion's ratio, off the policy that sampled; GSPO's weight; a choice among actions."""
    sampled = Sampled(problem)
    log_w_L = problem.tree.rows.sum(problem.old_N - problem.reference_N)
    largest = float(log_w_L.abs().max())
    if largest > LIMIT:
        rows = [skipped("surrogates of W", f"log-ratios up to {largest:.0f} are clamped to {LIMIT:g}")]
    else:
        rows = [*_objective_rows(sampled), *_bias_rows(problem)]
    title = "surrogates of whole completions: relative error where exact, cosine with the truth where biased"
    return Section(title, (*rows, _optimum_row(problem), *_weight_rows(problem), *_focus_rows(problem)))


def _objective_rows(sampled: Sampled) -> list[Row]:
    rows = sampled.rows
    advantage_L, length_L = sampled.advantage_N[rows.last], rows.lengths_S.double()
    positive_L = advantage_L > 0

    def soft(log_w_L: Tensor) -> Tensor:
        """A·∫φ(W)/W dW: e^λ·λ^{−k}·Γ(k) times the regularised incomplete gamma function of λW."""
        k_L = torch.where(positive_L, UP[0], DOWN[0]).double()
        lambda_L = torch.where(positive_L, UP[1], DOWN[1]).double()
        scale_L = (lambda_L - k_L * lambda_L.log() + torch.lgamma(k_L)).exp()
        share_L: Tensor = torch.special.gammainc(k_L, lambda_L * log_w_L.exp())
        return advantage_L * scale_L * share_L

    def tapered(log_w_L: Tensor) -> Tensor:
        """A·log W, and for A < 0 up to W = 1 A·W instead, which joins it there with the same slope."""
        joined_L = torch.where(log_w_L > 0, 1 + log_w_L, log_w_L.clamp(max=0).exp())
        return advantage_L * torch.where(positive_L, log_w_L, joined_L)

    def clipped(log_w_L: Tensor) -> Tensor:
        """A completion's length times the clipped surrogate of its geometric mean ratio."""
        s_L = (log_w_L / length_L).exp()
        return length_L * torch.minimum(advantage_L * s_L, advantage_L * s_L.clamp(1 - LOW, 1 + HIGH))

    claims: list[tuple[str, Surrogate, Objective, str]] = [
        (
            "sequence_soft",
            partial(
                surrogates.sequence_soft,
                k_positive=UP[0],
                lambda_positive=UP[1],
                k_negative=DOWN[0],
                lambda_negative=DOWN[1],
            ),
            soft,
            "∇ Σ b·A·∫φ(W)/W dW",
        ),
        ("tapered", surrogates.tapered, tapered, "∇ Σ b·A·f(W), f = log W; for A < 0 W up to 1, then 1 + log W"),
        (
            f"squared_log_ratio, tau={TAU:g}",
            partial(surrogates.squared_log_ratio, tau=TAU),
            lambda log_w_L: advantage_L * log_w_L - 0.5 * TAU * log_w_L**2,
            "∇ Σ b·(A·log W − ½τ·log² W)",
        ),
        (
            "sequence_clipped, sequence_sum",
            partial(surrogates.sequence_clipped, clip_low=LOW, clip_high=HIGH),
            clipped,
            "∇ Σ b·len·min(A·s, A·clip(s)), s = W^(1/len)",
        ),
    ]
    return [exact(f"off-policy: {name}", _error(sampled, f, of), told) for name, f, of, told in claims]


def _error(sampled: Sampled, surrogate: Surrogate, objective: Objective) -> float:
    """Of the expected gradient, with the sum over a completion's actions, against the objective's own."""
    problem = sampled.problem
    tree, before_L = problem.tree, truth.leaf_logp(problem.tree, problem.reference_XV)
    given = sampled.logp_N, sampled.old_N, sampled.advantage_N, sampled.rows
    found = problem.expected_gradient(ascent(surrogate, *given, sampled.weight_N))
    true = problem.true_gradient(
        lambda logp_XV: (before_L.exp() * objective(truth.leaf_logp(tree, logp_XV) - before_L)).sum()
    )
    return relative_error(found, true)


def _bias_rows(problem: Problem) -> list[Row]:
    """None of them follows E[r] but where W is 1: what fades or is cut is missing."""
    rows = problem.tree.rows
    advantage_N = rows.spread(problem.reward_L - problem.value_X[0])
    weight_N = rows.spread(truth.leaf_logp(problem.tree, problem.reference_XV).exp())
    found: dict[str, Surrogate] = {
        "sequence_soft": surrogates.sequence_soft,
        "tapered": surrogates.tapered,
        f"squared_log_ratio, tau={TAU:g}": partial(surrogates.squared_log_ratio, tau=TAU),
    }
    return [
        biased(
            f"off-policy: {name}, against E[r]",
            cosine(
                problem.expected_gradient(
                    ascent(surrogate, problem.old_N, problem.reference_N, advantage_N, rows, weight_N)
                ),
                problem.reward_gradient,
            ),
        )
        for name, surrogate in found.items()
    ]


def _optimum_row(problem: Problem) -> Row:
    """At the policy of greatest E[r] − τ·KL(policy ‖ b) log W is (r − V)/τ for every completion, V the soft value.

    So no completion has a slope there, and it does not matter how often each was sampled.
    """
    tree, rows = problem.tree, problem.tree.rows
    best_N = problem.at_actions(truth.soft_optimum(tree, problem.reference_XV, problem.reward_L, TAU))
    soft = truth.soft_values(tree, problem.reference_XV, problem.reward_L, TAU)[0]
    advantage_N = rows.spread(problem.reward_L - soft)
    surrogate = partial(surrogates.squared_log_ratio, tau=TAU)
    left_N = ascent(surrogate, best_N, problem.reference_N, advantage_N, rows)
    name = f"squared_log_ratio at the best policy of E[r] − {TAU:g}·KL(policy ‖ b): slope of each action"
    return exact(name, float(left_N.abs().max() / advantage_N.abs().max()), "0, whatever sampled")


def _weight_rows(problem: Problem) -> list[Row]:
    """A completion's ratio with its loss summed over the actions (LUSPO) and averaged over them (GSPO)."""
    rows = problem.tree.rows
    centred_N = rows.spread(problem.reward_L - problem.value_X[0])
    sampled_N = rows.spread(problem.probability_L)

    def found(weight_N: Tensor) -> Tensor:
        given = surrogates.sequence_clipped, problem.old_N, problem.old_N, centred_N, rows
        return problem.expected_gradient(ascent(*given, weight_N))

    averaged_N = sampled_N / rows.spread(rows.lengths_S.double())
    true = problem.reward_gradient
    return [
        exact("on-policy: sequence_clipped, sequence_sum", relative_error(found(sampled_N), true)),
        biased("on-policy: sequence_clipped, sequence_mean", cosine(found(averaged_N), true), "biased by length"),
    ]


def _focus_rows(problem: Problem) -> list[Row]:
    """Half of all actions, by the entropy of their states: a table has logits of its own for each state.

    So the gradient is the true one in the states that are kept, and 0 in the others.
    """
    tree, rows = problem.tree, problem.tree.rows
    logp_XV = problem.logp_XV.detach()
    entropy_X = -(logp_XV.exp() * logp_XV).sum(1)
    kept_N = focus.top_entropy(entropy_X[tree.state_N], share=0.5)
    centred_N = rows.spread(problem.reward_L - problem.value_X[0])
    given = surrogates.policy_gradient, problem.old_N, problem.old_N, centred_N * kept_N, rows
    found = problem.expected_gradient(ascent(*given, rows.spread(problem.probability_L)))
    least = entropy_X[tree.state_N].sort(descending=True).values[(rows.actions + 1) // 2 - 1]
    kept_X = (entropy_X >= least).double()
    true_XV = problem.reward_gradient.view(tree.states, tree.vocabulary) * kept_X[:, None]
    name = "top_entropy, half of the actions"
    return [
        exact(f"{name}: in the states that are kept", relative_error(found, true_XV.flatten())),
        biased(f"{name}, against E[r]", cosine(found, problem.reward_gradient)),
    ]
