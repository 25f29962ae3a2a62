"""Claims about group estimators: which advantage with which weight is the gradient of what.

Axes: P sampled groups, G completions each, K reward functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from rlpost.objectives import advantages
from rlpost.objectives.ragged import Ragged
from rlpost.oracle import truth
from rlpost.oracle.estimators import group_gradient, one_by_one
from rlpost.oracle.multisets import Multisets
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact

MEAN = 0.3
"""A running mean that earlier steps have left behind."""
BETA = 0.2
EPS = 1e-4
"""`group_normalised`'s, beside the spread."""

Advantage = Callable[[Problem, Multisets], Tensor | None]
"""[P, G] of all groups, or None where they are too many."""


class Claim(NamedTuple):
    """An estimator and what it estimates."""

    name: str
    advantage: Advantage
    weight: str
    scale: Callable[[Problem, int], float] | None
    """(problem, group size) -> the factor at which it is exact; None for a biased estimator."""
    expected: str
    sizes: tuple[int, ...] = SIZES
    objective: Callable[[Problem], Tensor] = lambda problem: problem.reward_gradient
    """[F] the true gradient it is compared with."""


def group_section(problem: Problem) -> Section:
    """Every advantage, over all groups of 2 and of 3 completions of one prompt."""
    two_levels = problem.binary()
    rows = [claim_row(problem, claim) for claim in [*_exact(), *_biased(), *_best_of_k()]]
    rows += [claim_row(two_levels, claim) for claim in _binary()]
    sizes = " / ".join(f"G={size}" for size in SIZES)
    return Section(
        f"group estimators, {sizes}: relative error where exact, cosine with the truth where biased", (*rows,)
    )


def claim_row(problem: Problem, claim: Claim) -> Row:
    """Compare an estimator's expected gradient with the true one."""
    found = [_compare(problem, claim, size) for size in claim.sizes]
    name = f"{claim.name}, {claim.weight}"
    return exact(name, found, claim.expected) if claim.scale else biased(name, found, claim.expected)


def _compare(problem: Problem, claim: Claim, size: int) -> float | None:
    sets = problem.groups(size)
    advantage_PG = None if sets is None else claim.advantage(problem, sets)
    if sets is None or advantage_PG is None:
        return None
    found = group_gradient(problem, sets, advantage_PG, claim.weight)
    if claim.scale is None:
        return cosine(found, claim.objective(problem))
    return relative_error(found, claim.objective(problem), claim.scale(problem, size))


def _exact() -> list[Claim]:
    """A baseline that the completion itself has no part in leaves the gradient as it is (Williams 1992).

    The group's mean contains the completion's own reward: that takes 1/G of the gradient away and nothing else.
    All of it needs sums over a completion: a division by lengths, which the policy chooses, would be a bias.
    """
    scale, soft = "exact, scale 1", partial(advantages.soft_leave_one_out, beta=BETA)
    return [
        Claim("leave_one_out", _of(advantages.leave_one_out), "sequence_sum", _one, scale),
        Claim(f"soft_leave_one_out, beta={BETA:g}", _of(soft), "sequence_sum", _one, scale),
        Claim("reward, without a baseline", _of(advantages.reward), "sequence_sum", _one, scale),
        Claim("ema_baseline", _running_mean, "sequence_sum", _one, scale),
        Claim("greedy_baseline", _greedy, "sequence_sum", _one, scale),
        Claim("group_mean", _of(advantages.group_mean), "sequence_sum", _without_own, "exact, scale 1 − 1/G"),
        Claim(
            "group_mean",
            _of(advantages.group_mean),
            "constant_length",
            lambda problem, size: _without_own(problem, size) / problem.tree.depth,
            "exact, scale (1 − 1/G)/length",
        ),
        Claim(
            "nonzero_rescaled, one prompt",
            _alone(advantages.nonzero_rescaled),
            "sequence_sum",
            _without_own,
            "exact, scale 1 − 1/G",
        ),
    ]


def _biased() -> list[Claim]:
    """Dividing by lengths, by a group's spread or by its mean changes which completions count how much."""
    mean, normalised = _of(advantages.group_mean), _of(advantages.group_normalised)
    own = "biased: its own reward, by its length, is in the baseline"
    return [
        Claim("group_mean", mean, "sequence_mean", None, "biased by length"),
        Claim("group_mean", mean, "token_mean", None, "biased by length"),
        Claim("leave_one_out", _of(advantages.leave_one_out), "token_mean", None, "biased by length"),
        Claim("group_normalised", normalised, "sequence_mean", None, "biased by length and spread"),
        Claim("group_normalised", normalised, "token_mean", None, "biased by length and spread"),
        Claim("group_normalised", normalised, "sequence_sum", None, "biased by spread"),
        Claim("per_reward_normalised", _two_rewards, "sequence_sum", None, "biased by spread"),
        Claim("length_weighted_baseline", _length_weighted, "sequence_sum", None, own),
        Claim("max_likelihood", _of(advantages.max_likelihood), "sequence_sum", None, "biased: divides by the mean"),
        Claim("whiten over the update's actions", _whitened, "sequence_sum", None, "biased by length and spread"),
    ]


def _best_of_k() -> list[Claim]:
    """`pass_at_k` follows another objective, the expected best of k completions, and follows it exactly."""
    with_2 = _of(lambda reward_PG: advantages.pass_at_k(reward_PG, k=2))
    return [
        Claim("pass_at_k k=2", with_2, "sequence_sum", _one, "exact for the best of 2, scale 1", SIZES, _best_of_2),
        Claim("pass_at_k k=2", with_2, "sequence_sum", None, "biased for the mean reward"),
    ]


def _binary() -> list[Claim]:
    """What holds for rewards of 0 and 1.

    In a group of two that differ the spread is always √½, so dividing by it only changes the scale; larger groups
    have more than one spread. And E[max_likelihood] = ∇p·Σ_{k<G} (1 − p)^{k−1}: the gradient of log p, its series cut.
    """
    normalised = _of(advantages.group_normalised)
    series = "exact, scale (1 − (1 − p)^(G−1))/p"

    def success(problem: Problem, size: int) -> float:
        p = float(problem.value_X[0])
        return float(1 - (1 - p) ** (size - 1)) / p

    def spread(_: Problem, size: int) -> float:
        return (1 - 1 / size) / (sqrt(0.5) + EPS)

    return [
        Claim("0/1, G=2: group_normalised", normalised, "sequence_sum", spread, "exact, scale ½/(√½ + eps)", (2,)),
        Claim("0/1: max_likelihood", _of(advantages.max_likelihood), "sequence_sum", success, series),
    ]


def _one(_: Problem, __: int) -> float:
    return 1.0


def _without_own(_: Problem, size: int) -> float:
    return 1 - 1 / size


def _of(function: Callable[[Tensor], Tensor]) -> Advantage:
    return lambda problem, sets: function(problem.reward_L[sets.leaf_PG])


def _alone(function: Callable[[Tensor], Tensor]) -> Advantage:
    return lambda problem, sets: one_by_one(function, problem.reward_L[sets.leaf_PG])


def _running_mean(problem: Problem, sets: Multisets) -> Tensor:
    return advantages.ema_baseline(problem.reward_L[sets.leaf_PG], MEAN)


def _greedy(problem: Problem, sets: Multisets) -> Tensor:
    """Against the completion of the most likely token in every state."""
    greedy = problem.reward_L[problem.tree.leaf_by(problem.logp_XV.detach().argmax(1))]
    return advantages.greedy_baseline(problem.reward_L[sets.leaf_PG], greedy.expand(len(sets.leaf_PG)))


def _length_weighted(problem: Problem, sets: Multisets) -> Tensor:
    length_PG = problem.tree.length_L[sets.leaf_PG].double()
    return advantages.length_weighted_baseline(problem.reward_L[sets.leaf_PG], length_PG)


def _whitened(problem: Problem, sets: Multisets) -> Tensor | None:
    """The reward of every action, over the spread of all actions of an update, which here is a group."""
    length_PG = problem.tree.length_L[sets.leaf_PG].double()

    def of_group(both_12: Tensor) -> Tensor:
        reward_1G, length_1G = both_12.chunk(2, 1)
        rows = Ragged(length_1G[0].long())
        return advantages.whiten(rows.spread(reward_1G[0]))[rows.start_S][None]

    return one_by_one(of_group, torch.cat([problem.reward_L[sets.leaf_PG], length_PG], 1))


def _two_rewards(problem: Problem, sets: Multisets) -> Tensor | None:
    """The reward in two parts, by length and the rest."""
    by_length_L = problem.tree.length_L.double() / (problem.tree.depth + 2)
    weight_K = torch.ones(2, dtype=torch.float64)
    both_PG2 = torch.stack([by_length_L, problem.reward_L - by_length_L], 1)[sets.leaf_PG]
    return one_by_one(lambda x_1: advantages.per_reward_normalised(x_1.view(1, -1, 2), weight_K), both_PG2.flatten(1))


def _best_of_2(problem: Problem) -> Tensor:
    """[F] the true gradient of the expected best of two: Σ r·(F(r)² − F(below r)²) over leaves in order of reward."""
    reward_L, order_L = problem.reward_L.sort()

    def best(logp_XV: Tensor) -> Tensor:
        below_L = truth.leaf_logp(problem.tree, logp_XV).exp()[order_L].cumsum(0) ** 2
        return (reward_L * below_L.diff(prepend=below_L.new_zeros(1))).sum()

    return problem.true_gradient(best)
