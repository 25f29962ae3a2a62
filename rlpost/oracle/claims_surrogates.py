"""Claims about surrogates: on the policy that sampled they are one gradient, and off it they are not.

Axes: L leaves, N actions of all leaves.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlpost.objectives import surrogates
from rlpost.objectives.correction import correction
from rlpost.objectives.kl import LIMIT
from rlpost.objectives.surrogates import policy_gradient
from rlpost.oracle import truth
from rlpost.oracle.estimators import Surrogate, ascent
from rlpost.oracle.problem import Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact, skipped

NO_CAP = 1e30
ANOTHER = (
    surrogates.clipped_surrogate,
    surrogates.clipped_weight,
    surrogates.sequence_clipped,
    surrogates.soft_adaptive,
    surrogates.divergence_masked,
    surrogates.sequence_soft,
    surrogates.tapered,
    surrogates.future_weighted,
)
"""Those whose gradient is the policy gradient's as long as the policy has not moved."""


def surrogate_section(problem: Problem) -> Section:
    """On-policy identities, and corrections for another sampler."""
    rows = [*_on_policy(problem), *_off_policy(problem)]
    return Section("surrogates: relative error where exact, cosine with the truth where biased", tuple(rows))


def _centred(problem: Problem) -> Tensor:
    """[N] advantages of both signs."""
    return problem.tree.rows.spread(problem.reward_L - problem.value_X[0])


def _on_policy(problem: Problem) -> list[Row]:
    """At r = 1 no clip is active and dr = dlogp, so every surrogate is REINFORCE there.

    `geometric_mean` has a completion's mean ratio, and with `sequence_mean` it is REINFORCE with `sequence_mean`.
    """
    rows = problem.tree.rows
    sampled_N = rows.spread(problem.probability_L)
    by_mean_N = sampled_N / rows.spread(rows.lengths_S.double())

    def found(surrogate: Surrogate, weight_N: Tensor) -> Tensor:
        return problem.expected_gradient(
            ascent(surrogate, problem.old_N, problem.old_N, _centred(problem), rows, weight_N)
        )

    plain, mean = found(policy_gradient, sampled_N), found(policy_gradient, by_mean_N)
    same, squared = "policy_gradient's", partial(surrogates.squared_log_ratio, tau=1.0)
    geometric = relative_error(found(surrogates.geometric_mean, by_mean_N), mean)
    return [
        exact("on-policy: policy_gradient", relative_error(plain, problem.reward_gradient)),
        *(
            exact(f"on-policy: {surrogate.__name__}", relative_error(found(surrogate, sampled_N), plain), same)
            for surrogate in ANOTHER
        ),
        exact("on-policy: squared_log_ratio", relative_error(found(squared, sampled_N), plain), same),
        exact("on-policy: geometric_mean, sequence_mean", geometric, same),
    ]


def _off_policy(problem: Problem) -> list[Row]:
    """Completions come from another policy, here the reference, and are weighted by how much likelier they are now.

    The ratio of the whole completion is the change of measure. An action's own ratio leaves out that the states before
    it and the reward after it came from the other policy; a cap leaves out the rest of the tail.
    """
    tree = problem.tree
    sampled_N = tree.rows.spread(truth.leaf_logp(tree, problem.reference_XV).exp())

    def found(weight_N: Tensor, surrogate: Surrogate = policy_gradient) -> Tensor:
        coefficient_N = ascent(
            surrogate, problem.old_N, problem.reference_N, _centred(problem), tree.rows, sampled_N * weight_N
        )
        return problem.expected_gradient(coefficient_N)

    def corrected(per: str, cap: float = NO_CAP, mode: str = "truncate") -> Tensor:
        return found(correction(problem.old_N, problem.reference_N, tree.rows, per=per, cap=cap, mode=mode))

    true, one_N = problem.reward_gradient, torch.ones_like(sampled_N)
    return [
        _whole_ratio(problem, relative_error(corrected("completion"), true)),
        biased("off-policy, ratio of each action", cosine(corrected("token"), true)),
        biased("off-policy, ratio of the completion cut at 2", cosine(corrected("completion", 2.0), true)),
        biased(
            "off-policy, ratio of the completion masked beyond 2", cosine(corrected("completion", 2.0, "mask"), true)
        ),
        biased("off-policy, uncorrected", cosine(found(one_N), true)),
        biased("off-policy, clipped_surrogate", cosine(found(one_N, surrogates.clipped_surrogate), true)),
    ]


def _whole_ratio(problem: Problem, error: float) -> Row:
    """Log-ratios are clamped before `exp`; on a deep tree some completions have a larger one."""
    name = "off-policy, ratio of the completion"
    largest = float(problem.tree.rows.sum(problem.old_N - problem.reference_N).abs().max())
    if largest > LIMIT:
        return skipped(name, f"log-ratios up to {largest:.0f} are clamped to {LIMIT:g}")
    return exact(name, error)
