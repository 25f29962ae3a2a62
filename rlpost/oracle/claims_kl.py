"""Claims about KL to a reference and about entropy: where the term stands decides what it is the gradient of.

Axes: X states, V tokens, N actions of all leaves, A actions of sampled groups, P groups, G completions.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlpost.objectives import advantages
from rlpost.objectives.kl import full_kl, k1, k2, k3, k3_weighted, kl_in_reward
from rlpost.objectives.surrogates import policy_gradient, ratio
from rlpost.oracle import truth
from rlpost.oracle.estimators import Drawn, ascent, descent
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact

BETA = 0.3
Estimator = Callable[[Tensor, Tensor], Tensor]


def kl_section(problem: Problem) -> Section:
    """Every placement and estimator of the KL, and two of the entropy, on a table."""
    title = "KL and entropy: relative error where exact, cosine with the truth where biased"
    rows = [*reward_rows(problem), *_loss_rows(problem), *_other_sampler_rows(problem), *_entropy_rows(problem)]
    return Section(title, (*rows,))


def reward_rows(problem: Problem, tolerance: float = 1e-12) -> list[Row]:
    """k1 as part of the reward is exact, summed from each action on or over the whole completion.

    k2 and k3 have the right mean or are never negative, but as a reward each is the gradient of another expectation.
    """
    true = problem.kl_gradient
    alone = relative_error(_in_reward(problem, k1), true)
    whole = relative_error(_whole_in_reward(problem), true)
    name = "leave_one_out − β·k1 in the reward, sequence_sum, " + " / ".join(f"G={g}" for g in SIZES)
    return [
        exact("k1 in the reward, from each action on", alone, tolerance=tolerance),
        exact("k1 in the reward, whole completion", whole, tolerance=tolerance),
        exact(name, [_with_task(problem, size) for size in SIZES], "exact for E[r] − β·KL", tolerance),
        biased("k3 in the reward", cosine(_in_reward(problem, k3), true)),
        biased("k2 in the reward", cosine(_in_reward(problem, k2), true)),
    ]


def _in_reward(problem: Problem, estimator: Estimator) -> Tensor:
    """[F] expected gradient along which the KL rises, one completion at a time."""
    kl_N = kl_in_reward(problem.old_N, problem.reference_N, problem.tree.rows, 1, estimator)
    return _policy_gradient(problem, kl_N)


def _whole_in_reward(problem: Problem) -> Tensor:
    rows = problem.tree.rows
    return _policy_gradient(problem, rows.spread(rows.sum(k1(problem.old_N, problem.reference_N))))


def _policy_gradient(problem: Problem, advantage_N: Tensor) -> Tensor:
    rows = problem.tree.rows
    weight_N = rows.spread(problem.probability_L)
    return problem.expected_gradient(ascent(policy_gradient, problem.old_N, problem.old_N, advantage_N, rows, weight_N))


def _with_task(problem: Problem, size: int) -> float | None:
    """Relative error of the task's advantage less β times the group-centred KL."""
    sets = problem.groups(size)
    if sets is None:
        return None
    drawn = Drawn(problem.tree, sets)
    rows, logp_A = drawn.rows, problem.old_N[drawn.action_A]
    task_A = rows.spread(advantages.leave_one_out(problem.reward_L[sets.leaf_PG]).flatten())
    kl_A = kl_in_reward(logp_A, problem.reference_N[drawn.action_A], rows, size)
    coefficient_A = ascent(policy_gradient, logp_A, logp_A, task_A - BETA * kl_A, rows, 1 / size)
    found = problem.expected_gradient(drawn.expected(coefficient_A))
    return relative_error(found, problem.reward_gradient - BETA * problem.kl_gradient)


def _loss_rows(problem: Problem) -> list[Row]:
    """In the loss, only the term's own derivative is seen, not that an action changes which states follow.

    k1's derivative is ∇logp, whose mean is zero: noise and nothing else. k2, k3 times the ratio and the KL over the
    whole vocabulary are one and the same in expectation; k3 alone is none of these.
    """
    true, reference_N = problem.kl_gradient, problem.reference_N
    nothing = _in_loss(problem, lambda logp_N: k1(logp_N, reference_N))
    squared = _in_loss(problem, lambda logp_N: k2(logp_N, reference_N))
    weighted = _in_loss(problem, lambda logp_N: ratio(logp_N, problem.old_N) * k3(logp_N, reference_N))
    alone = _in_loss(problem, lambda logp_N: k3(logp_N, reference_N))
    whole = _full(problem)
    same = max(relative_error(weighted, squared), relative_error(whole, squared))
    return [
        exact("k1 in the loss: ‖expected gradient‖/‖∇KL‖", float(nothing.norm() / true.norm()), "0: only noise"),
        exact("k2, k3·ratio, whole-vocabulary KL in the loss", same, "the three are identical"),
        biased("… and their cosine", cosine(squared, true)),
        biased("k3 in the loss", cosine(alone, true)),
    ]


def _other_sampler_rows(problem: Problem) -> list[Row]:
    """Of completions that another policy sampled, here the reference; the KL is to a third one.

    Only with the ratio is an action's term the KL of the state it was taken in, and then it is so for any sampler.
    """
    third_XV = problem.reference_XV.roll(1, 1)
    third_N = problem.at_actions(third_XV)
    weight_N = problem.tree.rows.spread(truth.leaf_logp(problem.tree, problem.reference_XV).exp())
    visits_X = truth.visits(problem.tree, problem.reference_XV)
    true = problem.true_gradient(lambda logp_XV: (visits_X * full_kl(logp_XV, third_XV)).sum())

    def found(term: Callable[[Tensor], Tensor]) -> Tensor:
        return problem.expected_gradient(descent(term, problem.old_N, weight_N))

    weighted = found(lambda logp_N: k3_weighted(logp_N, third_N, problem.reference_N))
    told = "exact for the KL of each state visited"
    return [
        exact("k3_weighted in the loss, another sampler", relative_error(weighted, true), told),
        biased("k2 in the loss, another sampler", cosine(found(lambda logp_N: k2(logp_N, third_N)), true)),
        biased("k3 in the loss, another sampler", cosine(found(lambda logp_N: k3(logp_N, third_N)), true)),
    ]


def _in_loss(problem: Problem, term: Callable[[Tensor], Tensor]) -> Tensor:
    weight_N = problem.tree.rows.spread(problem.probability_L)
    return problem.expected_gradient(descent(term, problem.old_N, weight_N))


def _full(problem: Problem) -> Tensor:
    """[F] gradient of the KL over the vocabulary in each state, states as they were visited."""
    visits_X = truth.visits(problem.tree, problem.logp_XV.detach())
    return problem.true_gradient(lambda logp_XV: (visits_X * full_kl(logp_XV, problem.reference_XV)).sum())


def _entropy_rows(problem: Problem) -> list[Row]:
    """The usual entropy bonus forgets that actions lead to states of other entropy; −logp as a reward does not."""
    visits_X = truth.visits(problem.tree, problem.logp_XV.detach())
    bonus = problem.true_gradient(lambda logp_XV: -(visits_X * (logp_XV.exp() * logp_XV).sum(1)).sum())
    in_reward = _policy_gradient(problem, problem.tree.rows.suffix_sum(-problem.old_N))
    true = problem.entropy_gradient
    return [
        exact("entropy: −logp in the reward", relative_error(in_reward, true)),
        biased("entropy: each state's, in the loss", cosine(bonus, true)),
    ]
