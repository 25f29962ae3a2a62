"""Claims about losses of pairs without a reference, about sums of losses, and about gold answers beside pairs.

Without a reference a loss fits a function of a completion's own log-probability to the preferences, and the policy that
minimises it can be written down: that is where a bias by length shows.

Axes: X states, V tokens, L leaves, N actions of all leaves, P pairs, 2 = (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlpost.objectives.coupled import linearised
from rlpost.objectives.mixed import WeightedSum
from rlpost.objectives.preference import PairBatch, alphapo, bco, cpo, dpo, simpo
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.weights import part_mean
from rlpost.oracle import truth
from rlpost.oracle.claims_pairs import Drawn
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import EXACT, Row, Section, exact, holds, skipped
from rlpost.oracle.tree import Tree

BETA, GAMMA = 0.5, 0.3
ALPHAS = (0.0, 0.25)
LIMIT = 1e-14
"""An α that float64 cannot tell from its limit."""
WEIGHTS = {"dpo": 0.8, "bco": 0.2}
MOST_LEAVES = 600
"""Whose pairs are all enumerated."""

PairLoss = Callable[[PairBatch], Tensor]


def pure_pair_section(problem: Problem) -> Section:
    """Their limits, their optima, and what they do to lengths."""
    drawn = Drawn(problem)
    rows = [_limit_row(drawn), *_optimum_rows(problem), *_gold_rows(problem), *_sum_rows(drawn)]
    return Section("preferences without a reference, in sums, with gold answers (β = 0.5)", tuple(rows))


def _limit_row(d: Drawn) -> Row:
    """AlphaPO is SimPO at α = 0, and next to it on both sides."""
    errors = []
    for alpha in (0.0, LIMIT, -LIMIT):
        pairs = PairBatch(d.logp_P2, d.reference_P2, d.length_P2)
        bent, straight = partial(alphapo, beta=BETA, gamma=GAMMA, alpha=alpha), partial(simpo, beta=BETA, gamma=GAMMA)
        values = relative_error(bent(pairs), straight(pairs))
        errors.append(max(values, relative_error(d.slopes(bent), d.slopes(straight))))
    return exact("alphapo, α=0/+0/−0, against simpo: value and gradient", errors, "the same")


def _optimum_rows(problem: Problem) -> list[Row]:
    """With Bradley–Terry preferences, the policy whose own reward is r + a constant has an expected gradient of zero.

    `cpo` without its likelihood has β·logp as reward, so its optimum is π ∝ e^{r/β}. That of `alphapo` gives equally
    good completions the same probability per token, and so a long one the less the longer it is: with equal rewards
    every token is as likely as any other, and not every completion.
    """
    tree = problem.tree
    if tree.leaves > MOST_LEAVES:
        return [skipped("optima without a reference", f"more than {MOST_LEAVES} completions")]
    length_L = tree.length_L.double()
    boltzmann_L = (problem.reward_L / BETA).softmax(0)
    plain = partial(cpo, beta=BETA, alpha=0.0)
    found = _at_optimum(problem, plain, boltzmann_L)
    rows = [exact("cpo, α=0: expected gradient at π ∝ e^{r/β}", found, "0: the optimum with a uniform reference")]
    even_L = _bent_optimum(length_L, torch.zeros_like(length_L), ALPHAS[1])
    uniform_L = (-length_L * torch.tensor(float(tree.vocabulary)).double().log()).exp()
    errors = []
    for alpha in ALPHAS:
        bent = partial(alphapo, beta=BETA, gamma=0.0, alpha=alpha)
        errors.append(_at_optimum(problem, bent, _bent_optimum(length_L, problem.reward_L, alpha)))
    lengths = [float(p_L @ length_L) for p_L in (even_L, torch.full_like(length_L, 1 / tree.leaves))]
    shorter = lengths[0] < lengths[1]
    return [
        *rows,
        exact("alphapo, α=0/0.25, γ=0: expected gradient where its reward is r + c", errors, "0: its optimum"),
        exact("alphapo, equal rewards: its optimum", relative_error(even_L, uniform_L), "every token is as likely"),
        holds(
            "alphapo, equal rewards: mean length at its optimum, and of all completions",
            f"{lengths[0]:.4f} / {lengths[1]:.4f}",
            "shorter: biased by length",
            shorter,
            "biased, as expected",
        ),
    ]


def _bent_optimum(length_L: Tensor, reward_L: Tensor, alpha: float) -> Tensor:
    """[L] probabilities e^{L·m} with β·(1 − e^{−αm})/α = r + c, c such that they sum to 1: found by halving."""

    def of(c: float) -> Tensor:
        scaled_L = (reward_L + c) / BETA
        mean_L = scaled_L if alpha == 0 else -torch.log1p(-alpha * scaled_L) / alpha
        return (length_L * mean_L).exp()

    low, high = -1e3, -float(reward_L.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if float(of(middle).sum()) > 1 else (middle, high)
    return of(low)


def _at_optimum(problem: Problem, loss: PairLoss, probability_L: Tensor) -> float:
    """‖expected gradient over all pairs‖ at a policy, in units of the one at the reference."""
    optimum_XV = truth.conditional(problem.tree, probability_L)
    return float(_slope(problem, loss, optimum_XV).norm() / _slope(problem, loss, problem.reference_XV).norm())


def _slope(problem: Problem, loss: PairLoss, logits_XV: Tensor) -> Tensor:
    tree = problem.tree
    first_P, second_P = torch.triu_indices(tree.leaves, tree.leaves, 1)
    wins_P = torch.sigmoid(problem.reward_L[first_P] - problem.reward_L[second_P])
    moving_XV = logits_XV.detach().requires_grad_()
    logp_L = truth.leaf_logp(tree, moving_XV.log_softmax(1))
    length_L = tree.length_L.double()

    def of(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        index_P2 = torch.stack([chosen_P, rejected_P], 1)
        return loss(PairBatch(logp_L[index_P2], torch.zeros_like(logp_L[index_P2]), length_L[index_P2]))

    either_P = wins_P * of(first_P, second_P) + (1 - wins_P) * of(second_P, first_P)
    return truth.gradient(either_P.mean(), [moving_XV])


def _gold_rows(problem: Problem) -> list[Row]:
    """Where the policy is the gold answers' own distribution, their likelihood has nothing to teach.

    So it is with a token mean over all of them, `part_mean`; with a mean per completion short answers count more, and
    in an update of two triples a little of that is left, as with every token mean.
    """
    tree = problem.tree
    count_L = 1 + torch.arange(tree.leaves) % 3
    q_L, length_L = count_L.double() / count_L.sum(), tree.length_L.double()
    gold_XV = truth.conditional(tree, q_L)
    gold = torch.repeat_interleave(torch.arange(tree.leaves), count_L).tolist()
    leaves = [leaf for each in gold for leaf in (0, tree.leaves - 1, each)]
    weights = part_mean(Ragged(tree.length_L[torch.tensor(leaves)]), 2, 3)

    def by_tokens(logp_L: Tensor, logp_N: Tensor) -> Tensor:  # noqa: ARG001
        return -(weights * logp_N).sum()

    def by_completion(logp_L: Tensor, logp_N: Tensor) -> Tensor:  # noqa: ARG001
        return -(q_L * logp_L / length_L).sum()

    def by_two(logp_L: Tensor, logp_N: Tensor) -> Tensor:  # noqa: ARG001
        both_LL = (logp_L[:, None] + logp_L) / (length_L[:, None] + length_L)
        return -(q_L[:, None] * q_L * both_LL).sum()

    left = [_left(tree, of, leaves, gold_XV, problem.reference_XV) for of in (by_tokens, by_completion, by_two)]
    name = "gold likelihood, π the gold answers' distribution"
    biases = (("a mean per completion", left[1]), ("a token mean over two triples", left[2]))
    return [
        exact(f"{name}: expected gradient of part_mean over all", left[0], "0: the optimum"),
        *(
            holds(f"{name}: of {how}", f"{x:.4f}", "> 0: biased by length", x > EXACT, "biased, as expected")
            for how, x in biases
        ),
    ]


def _left(
    tree: Tree, of: Callable[[Tensor, Tensor], Tensor], leaves: list[int], at_XV: Tensor, scale_XV: Tensor
) -> float:
    """‖gradient‖ at one policy in units of the one at another."""

    def slope(logits_XV: Tensor) -> Tensor:
        moving_XV = logits_XV.detach().requires_grad_()
        logp_XV = moving_XV.log_softmax(1)
        every_N = logp_XV[tree.state_N, tree.token_N]
        begin_L, lengths = tree.rows.start_S.tolist(), tree.length_L.tolist()
        index_N = torch.tensor([begin_L[leaf] + k for leaf in leaves for k in range(lengths[leaf])])
        return truth.gradient(of(truth.leaf_logp(tree, logp_XV), every_N[index_N]), [moving_XV])

    return float(slope(at_XV).norm() / slope(scale_XV).norm())


def _sum_rows(d: Drawn) -> list[Row]:
    """A sum with a loss that couples pairs: by hand, and what it would be with two halves by themselves."""
    mixed = WeightedSum({"dpo": partial(dpo, beta=BETA), "bco": partial(bco, beta=BETA)}, WEIGHTS)
    shift = BETA * (d.delta_w + d.delta_l).mean() / 2
    pull = BETA * ((BETA * d.h).sigmoid() - 1)
    up, down = BETA * ((BETA * d.delta_w - shift).sigmoid() - 1), BETA * (BETA * d.delta_l - shift).sigmoid()
    by_hand = torch.stack([0.8 * pull + 0.2 * up, -0.8 * pull + 0.2 * down], 1)

    def whole(x_P2: Tensor, some: slice) -> Tensor:
        return mixed(PairBatch(x_P2[some], d.reference_P2[some], d.length_P2[some])).sum()

    _, slope_P2 = linearised(lambda x_P2: whole(x_P2, slice(None)), d.logp_P2)
    half = len(d.h) // 2
    _, apart_P2 = linearised(lambda x_P2: whole(x_P2, slice(half)) + whole(x_P2, slice(half, None)), d.logp_P2)
    error = relative_error(apart_P2, by_hand)
    return [
        exact("0.8·dpo + 0.2·bco, linearised over the update: gradient", relative_error(slope_P2, by_hand), "by hand"),
        holds(
            "0.8·dpo + 0.2·bco in two halves by themselves: relative error",
            f"{error:.1e}",
            "> 0: not the update's",
            error > EXACT,
            "biased, as expected",
        ),
    ]
