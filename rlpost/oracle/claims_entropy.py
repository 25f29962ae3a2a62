"""Claims about choices among an update's actions, the KL that holds some of them back, and where entropy goes.

Each choice is made again in plain Python, action by action, and the gradient that is left is taken by hand.

Axes: X states, V tokens, N actions of all leaves, C candidates among them.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from rlpost.objectives import focus
from rlpost.objectives.entropy import action_covariance, adaptive_entropy
from rlpost.objectives.kl import full_kl, kl_from_old
from rlpost.objectives.surrogates import clipped_surrogate, policy_gradient
from rlpost.oracle import truth
from rlpost.oracle.claims_offpolicy import Sampled
from rlpost.oracle.estimators import ascent, descent
from rlpost.oracle.problem import Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact, skipped

BETA, SHARE = 0.7, 0.25
NO_CLIP = partial(clipped_surrogate, clip_low=1.0, clip_high=1e9)
BY_HAND = "by hand"
MOST_ACTIONS = 4000
"""Of which every draw is tried."""


def entropy_section(problem: Problem) -> Section:
    """Clip-Cov, KL-Cov, M2PO and the adaptive bonus."""
    sampled = Sampled(problem)
    rows = [
        _rate_row(),
        *_clip_rows(problem),
        *_old_kl_rows(problem),
        _kl_cov_row(sampled),
        *_moment_rows(sampled),
        _adaptive_row(),
    ]
    title = "surrogates of chosen actions, and entropy: relative error where exact, cosine with the truth where biased"
    return Section(title, tuple(rows))


def _rate_row() -> Row:
    """A softmax whose probabilities are eighths, so that its actions come as often as they are likely."""
    count_V = torch.tensor([4, 2, 1, 1])
    logp_V, advantage_V = (count_V.double() / 8).log(), torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    moved = torch.zeros((), dtype=torch.float64, requires_grad=True)
    after_V = (logp_V + moved * advantage_V).log_softmax(0)
    (rate,) = torch.autograd.grad(-(after_V.exp() * after_V).sum(), moved)
    found = action_covariance(logp_V.repeat_interleave(count_V), advantage_V.repeat_interleave(count_V)).mean()
    return exact("action_covariance, its mean", abs(float(found / -rate) - 1), "−dH where logits move along A")


def _covariances(logp_N: Tensor, advantage_N: Tensor) -> list[float]:
    """The same as `action_covariance`, in plain Python."""
    logp, advantage = logp_N.tolist(), advantage_N.tolist()
    mean_logp, mean_advantage = fmean(logp), fmean(advantage)
    return [(a - mean_advantage) * (x - mean_logp) for x, a in zip(logp, advantage, strict=True)]


def _clip_rows(problem: Problem) -> list[Row]:
    """One of C candidates is drawn, so each keeps its gradient in C − 1 of C draws; all draws are tried."""
    name, rows = "clip_covariance, mean over all draws", problem.tree.rows
    advantage_N = rows.spread(problem.reward_L - problem.value_X[0])
    covariance = _covariances(problem.old_N, advantage_N)
    levels = sorted({round(x, 9) for x in covariance})
    if len(levels) < 4 or len(covariance) > MOST_ACTIONS:
        return [skipped(name, f"{len(covariance)} actions", BY_HAND)]
    middle = len(levels) // 2
    low, high = (levels[middle - 1] + levels[middle]) / 2, (levels[-2] + levels[-1]) / 2
    candidates = {n for n, x in enumerate(covariance) if low <= x <= high}
    given = problem.old_N, advantage_N
    # All others have smaller numbers, and are none to draw from.
    number_N = torch.tensor([0.5 * (n in candidates) for n in range(len(covariance))], dtype=torch.float64)
    draws = []
    for first in candidates:
        uniform_N = number_N.index_fill(0, torch.tensor(first), 0.25)
        draws.append(focus.clip_covariance(*given, uniform_N, share=1e-9, low=low, high=high))
    by_hand = [1 - (n in candidates) / len(candidates) for n in range(len(covariance))]
    weight_N = rows.spread(problem.probability_L)
    factor_N = torch.stack(draws).mean(0)
    same = problem.old_N, problem.old_N
    found = problem.expected_gradient(ascent(policy_gradient, *same, advantage_N * factor_N, rows, weight_N))
    true = problem.expected_gradient(advantage_N * torch.tensor(by_hand, dtype=torch.float64) * weight_N)
    return [
        exact(name, relative_error(found, true), BY_HAND),
        biased("clip_covariance, against E[r]", cosine(found, problem.reward_gradient)),
    ]


def _old_kl_rows(problem: Problem) -> list[Row]:
    """Of samples of the old policy, here the reference: E[r·∇log π] = 0, so r − 1 − log r has the slope of −log r."""
    old_N, weight_N = problem.reference_N, problem.tree.rows.spread(_of_old(problem))
    visits_X = truth.visits(problem.tree, problem.reference_XV)
    true = problem.true_gradient(lambda logp_XV: (visits_X * full_kl(problem.reference_XV, logp_XV)).sum())

    def found(estimator: Literal["k3", "abs"]) -> Tensor:
        term = partial(kl_from_old, old_logp_N=old_N, estimator=estimator)
        return problem.expected_gradient(descent(term, problem.old_N, weight_N))

    told = "exact for KL(old ‖ policy) of each state visited"
    return [
        exact("kl_from_old in the loss of all actions", relative_error(found("k3"), true), told),
        biased("kl_from_old, estimator=abs", cosine(found("abs"), true)),
    ]


def _of_old(problem: Problem) -> Tensor:
    """[L] probability of each completion under the old policy."""
    return truth.leaf_logp(problem.tree, problem.reference_XV).exp()


def _kl_cov_row(sampled: Sampled) -> Row:
    """r·A, less β(r − 1 − log r) of the quarter of all actions that has the largest covariance."""
    a_N, r_N, problem = sampled.advantage_N, sampled.r_N, sampled.problem
    covariance = _covariances(sampled.logp_N, a_N)
    count = -(-len(covariance) // 4)
    least = sorted(covariance)[-count] - 1e-12
    chosen_N = torch.tensor([float(x >= least and x > 0) for x in covariance], dtype=torch.float64)
    weight_N = BETA * focus.top_covariance(sampled.logp_N, a_N, share=SHARE)

    def loss(logp_N: Tensor) -> Tensor:
        return NO_CLIP(logp_N, sampled.old_N, a_N, sampled.rows) + weight_N * kl_from_old(logp_N, sampled.old_N)

    found = problem.expected_gradient(-descent(loss, sampled.logp_N, sampled.weight_N))
    true = problem.expected_gradient((a_N * r_N - BETA * chosen_N * (r_N - 1)) * sampled.weight_N)
    return exact("KL-Cov: top_covariance, kl_from_old", relative_error(found, true), "closed form")


def _moment_rows(sampled: Sampled) -> list[Row]:
    """The paper's algorithm 1 as it stands there: the worst goes until the mean of the others is small enough."""
    a_N, problem = sampled.advantage_N, sampled.problem
    square = sampled.r_N.log().square().tolist()
    onward = [n for n, (r, a) in enumerate(zip(sampled.r_N.tolist(), a_N.tolist(), strict=True)) if (r - 1) * a > 0]
    limit = 0.5 * fmean(square[n] for n in onward)
    left = sorted(onward, key=lambda n: square[n])
    total = sum(square[n] for n in left)
    while left and total / len(left) > limit:
        total -= square[left.pop()]
    gone = set(onward) - set(left)
    kept_N = torch.tensor([float(n not in gone) for n in range(len(square))], dtype=torch.float64)
    factor_N = focus.second_moment(sampled.logp_N, sampled.old_N, a_N, limit=limit)
    given = sampled.logp_N, sampled.old_N, a_N * factor_N, sampled.rows, sampled.weight_N
    found = problem.expected_gradient(ascent(NO_CLIP, *given))
    true = problem.expected_gradient(kept_N * a_N * sampled.r_N * sampled.weight_N)
    centred_N = sampled.rows.spread(problem.reward_L - problem.value_X[0])
    factor_N = focus.second_moment(sampled.logp_N, sampled.old_N, centred_N, limit=limit)
    left_N = ascent(NO_CLIP, sampled.logp_N, sampled.old_N, centred_N * factor_N, sampled.rows, sampled.weight_N)
    return [
        exact("second_moment, without a clip", relative_error(found, true), BY_HAND),
        biased("second_moment, against E[r]", cosine(problem.expected_gradient(left_N), problem.reward_gradient)),
    ]


def _adaptive_row() -> Row:
    """Eight steps, target 0.5: the weight of the bonus in each."""
    coef, weights = 0.0, []
    for entropy in (1.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.6, 0.5):
        weight, coef = adaptive_entropy(coef, entropy, target=0.5, delta=0.25)
        weights.append(weight)
    by_hand = [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 0.0, 0.75, 1.0]
    apart = max(abs(x - y) for x, y in zip([*weights, coef], by_hand, strict=True))
    return exact("adaptive_entropy over eight steps", apart, BY_HAND)
