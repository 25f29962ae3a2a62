"""Claims about preferences: where learning from pairs and reinforcement learning are one problem, and where not.

Axes: X states, V tokens, L leaves, N actions of all leaves, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives.preference import PairBatch, dpo, dpo_robust
from rlpost.oracle import truth
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import EXACT, Row, Section, exact, holds, skipped
from rlpost.oracle.tree import Tree

BETA = 0.5
FLIPS = 0.2
"""Share of labels that are wrong, for the robust loss."""
MOST_FITTED = 150
"""Leaves whose scores are fitted to preferences by Newton's method."""


def preference_section(problem: Problem) -> Section:
    """The identity behind DPO, its optimum, and where the two part."""
    rows = [*_posterior_rows(problem), *_pair_rows(problem), *_parting_rows(problem)]
    return Section("preferences and KL-regularised reward (β = 0.5)", tuple(rows))


def _posterior_rows(problem: Problem) -> list[Row]:
    """The optimum of E[r] − β·KL weighs the reference with exp(r/β), so β·log(π*/ref) = r − V_soft(root).

    A reward is therefore known from its optimal policy but for one constant a prompt, which no difference of two
    completions sees: that is all that DPO needs.
    """
    tree, reference_XV = problem.tree, problem.reference_XV
    optimum_XV = truth.soft_optimum(tree, reference_XV, problem.reward_L, BETA)
    root = truth.soft_values(tree, reference_XV, problem.reward_L, BETA)[0]
    implied_L = BETA * (truth.leaf_logp(tree, optimum_XV) - truth.leaf_logp(tree, reference_XV))
    at_optimum = _regularised_gradient(problem, optimum_XV)
    at_reference = _regularised_gradient(problem, reference_XV)
    value = regularised(problem, optimum_XV)
    return [
        exact("β·log(π*/ref) against r − V_soft(root)", relative_error(implied_L, problem.reward_L - root)),
        exact("E[r] − β·KL at π* against V_soft(root)", float((value / root - 1).abs())),
        exact("gradient of E[r] − β·KL at π*", _against(at_optimum, at_reference), "0"),
    ]


def regularised(problem: Problem, logp_XV: Tensor, reward_L: Tensor | None = None) -> Tensor:
    """E[reward] − β·KL(policy || reference)."""
    reward_L = problem.reward_L if reward_L is None else reward_L
    return truth.values(problem.tree, logp_XV, reward_L)[0] - BETA * truth.kl(
        problem.tree, logp_XV, problem.reference_XV
    )


def _regularised_gradient(problem: Problem, logits_XV: Tensor) -> Tensor:
    moving_XV = logits_XV.detach().requires_grad_()
    return truth.gradient(regularised(problem, moving_XV.log_softmax(1)), [moving_XV])


def _pair_rows(problem: Problem) -> list[Row]:
    """With Bradley–Terry preferences under the reward, DPO's optimum is that of reinforcement learning.

    Its expected gradient over all pairs is zero at π*, and the loss is convex in the implied rewards. And where labels
    are flipped at a known rate, `dpo_robust` has the gradient that `dpo` has on clean labels.
    """
    name, expected = "expected gradient of dpo at π*, Bradley–Terry labels", "0: the same optimum"
    pairs = _LeafPairs.of(problem)
    if pairs is None:
        return [skipped(name, "too many pairs", expected)]
    optimum_XV = truth.soft_optimum(problem.tree, problem.reference_XV, problem.reward_L, BETA)
    at_optimum = pairs.gradient(optimum_XV, pairs.wins_P)
    at_reference = pairs.gradient(problem.reference_XV, pairs.wins_P)
    flipped_P = (1 - FLIPS) * pairs.wins_P + FLIPS * (1 - pairs.wins_P)
    policy_XV = problem.logp_XV.detach()
    robust = pairs.gradient(policy_XV, flipped_P, robust=True)
    return [
        exact(name, _against(at_optimum, at_reference), expected),
        exact(
            "dpo_robust on flipped labels against dpo on clean ones",
            relative_error(robust, pairs.gradient(policy_XV, pairs.wins_P)),
            "the same gradient",
        ),
    ]


class _LeafPairs:
    """Every pair of different leaves, drawn from the reference; which one wins is a probability."""

    def __init__(self, problem: Problem, first_P: Tensor, second_P: Tensor) -> None:
        self.problem = problem
        self.first_P, self.second_P = first_P, second_P
        self.reference_L = truth.leaf_logp(problem.tree, problem.reference_XV)
        share_P = (self.reference_L[first_P] + self.reference_L[second_P]).exp()
        self.share_P = share_P / share_P.sum()
        self.wins_P = torch.sigmoid(problem.reward_L[first_P] - problem.reward_L[second_P])
        """Probability that the first of each pair is preferred, after Bradley and Terry."""

    @staticmethod
    def of(problem: Problem) -> _LeafPairs | None:
        """All pairs, or None where they are more than 200000."""
        leaves = problem.tree.leaves
        if leaves * (leaves - 1) // 2 > 200_000:
            return None
        first_P, second_P = torch.triu_indices(leaves, leaves, 1)
        return _LeafPairs(problem, first_P, second_P)

    def without(self, leaf: int) -> _LeafPairs:
        """Those in which a completion does not occur."""
        kept = (self.first_P != leaf) & (self.second_P != leaf)
        return _LeafPairs(self.problem, self.first_P[kept], self.second_P[kept])

    def loss(self, logp_XV: Tensor, wins_P: Tensor, robust: bool = False) -> Tensor:
        """The expected loss of `dpo`, or `dpo_robust`, over pairs and labels."""
        tree = self.problem.tree
        logp_L, length_L = truth.leaf_logp(tree, logp_XV), tree.length_L.double()

        def of(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
            index_P2 = torch.stack([chosen_P, rejected_P], 1)
            pairs = PairBatch(logp_L[index_P2], self.reference_L[index_P2], length_L[index_P2])
            return dpo_robust(pairs, beta=BETA, epsilon=FLIPS) if robust else dpo(pairs, beta=BETA)

        either_P = wins_P * of(self.first_P, self.second_P) + (1 - wins_P) * of(self.second_P, self.first_P)
        return (self.share_P * either_P).sum()

    def gradient(self, logits_XV: Tensor, wins_P: Tensor, robust: bool = False) -> Tensor:
        """[F] of the expected loss, by the logits."""
        moving_XV = logits_XV.detach().requires_grad_()
        return truth.gradient(self.loss(moving_XV.log_softmax(1), wins_P, robust), [moving_XV])


def _parting_rows(problem: Problem) -> list[Row]:
    """Two ways in which DPO stops being reinforcement learning, each with what it costs in regularised reward."""
    pairs = _LeafPairs.of(problem)
    if pairs is None or problem.tree.leaves > MOST_FITTED:
        return [skipped("where DPO and RL part", f"more than {MOST_FITTED} completions")]
    return [*_support_rows(problem, pairs), *_intransitive_rows(problem, pairs)]


def _support_rows(problem: Problem, pairs: _LeafPairs) -> list[Row]:
    """A completion that no pair contains: DPO's loss is blind to how much of the policy goes there, reward is not.

    Moving a share of π* onto it scales all others alike, and no margin between two of them changes.
    """
    tree = problem.tree
    worst = int(problem.reward_L.argmin())
    observed = pairs.without(worst)
    optimum_XV = truth.soft_optimum(tree, problem.reference_XV, problem.reward_L, BETA)
    probability_L = 0.5 * truth.leaf_logp(tree, optimum_XV).exp()
    probability_L[worst] += 0.5
    moved_XV = truth.conditional(tree, probability_L)
    losses = [observed.loss(logp_XV, observed.wins_P) for logp_XV in (optimum_XV, moved_XV)]
    gap = float(regularised(problem, optimum_XV) - regularised(problem, moved_XV))
    name = "half of π* moved to a completion that no pair contains"
    return [
        exact(f"{name}: change of DPO's loss", float((losses[1] / losses[0] - 1).abs()), "0"),
        holds(f"{name}: loss of E[r] − β·KL", f"{gap:.4f}", "> 0: here they part", gap > EXACT, "a gap, as expected"),
    ]


def _intransitive_rows(problem: Problem, pairs: _LeafPairs) -> list[Row]:
    """Preferences in a circle, which no Bradley–Terry score explains, against maximising the rate of wins.

    DPO finds the best scores there are; the best policy for the rate of wins over the reference, with the same KL, is
    another one. With preferences that scores do explain, DPO's fit is the reward itself (the control).
    """
    tree = problem.tree
    control_L = _fitted(tree, pairs, pairs.wins_P)
    reward_L = problem.reward_L - problem.reward_L.mean()
    circle_P = _in_a_circle(pairs)
    scores_L = _fitted(tree, pairs, circle_P)
    reference_XV = problem.reference_XV
    fitted_XV = truth.soft_optimum(tree, reference_XV, scores_L, BETA)
    wins_L = _win_rate(pairs, circle_P)
    best = regularised(problem, truth.soft_optimum(tree, reference_XV, wins_L, BETA), wins_L)
    gap = float(best - regularised(problem, fitted_XV, wins_L))
    slopes = [pairs.gradient(logp_XV, circle_P) for logp_XV in (fitted_XV, reference_XV)]
    unexplained = (circle_P - torch.sigmoid(scores_L[pairs.first_P] - scores_L[pairs.second_P])).abs().max()
    name = "preferences in a circle"
    return [
        exact(
            "Bradley–Terry preferences: DPO's implied rewards against r",
            relative_error(control_L, reward_L),
            tolerance=1e-9,
        ),
        exact(f"{name}: expected gradient of dpo at the fit", _against(*slopes), "0", 1e-9),
        holds(f"{name}: what no score explains", f"{float(unexplained):.4f}", "> 0", float(unexplained) > 1e-6),
        holds(
            f"{name}: loss of win rate − β·KL by DPO",
            f"{gap:.4f}",
            "> 0: here they part",
            gap > 1e-9,
            "a gap, as expected",
        ),
    ]


def _in_a_circle(pairs: _LeafPairs) -> Tensor:
    """[P] each completion beats the half of the others that follow it, around a circle, nine times in ten."""
    leaves = pairs.problem.tree.leaves
    ahead_P = (pairs.second_P - pairs.first_P) % leaves
    return torch.where(ahead_P * 2 < leaves, 0.9, 0.1).double()


def _win_rate(pairs: _LeafPairs, wins_P: Tensor) -> Tensor:
    """[L] probability of being preferred to a completion of the reference; a tie with itself is a half."""
    reference_L = pairs.reference_L.exp()
    wins_L = 0.5 * reference_L
    wins_L = wins_L.index_add(0, pairs.first_P, wins_P * reference_L[pairs.second_P])
    return wins_L.index_add(0, pairs.second_P, (1 - wins_P) * reference_L[pairs.first_P])


def _fitted(tree: Tree, pairs: _LeafPairs, wins_P: Tensor, steps: int = 30) -> Tensor:
    """[L] the scores, of mean 0, that minimise −Σ share·log-likelihood: DPO's implied rewards at its optimum."""
    first, second = pairs.first_P, pairs.second_P
    scores_L = torch.zeros(tree.leaves, dtype=torch.float64)
    for _ in range(steps):
        said_P = torch.sigmoid(scores_L[first] - scores_L[second])
        slope_P, curve_P = pairs.share_P * (said_P - wins_P), pairs.share_P * said_P * (1 - said_P)
        slope_L = torch.zeros_like(scores_L).index_add(0, first, slope_P).index_add(0, second, -slope_P)
        curve_LL = torch.zeros(tree.leaves, tree.leaves, dtype=torch.float64)
        curve_LL[first, second] = -curve_P
        curve_LL = curve_LL + curve_LL.T
        curve_LL = curve_LL - torch.diag(curve_LL.sum(1))
        # Scores are known but for a constant: a bit of curvature along it pins their mean to 0.
        scores_L = scores_L - torch.linalg.solve(curve_LL + curve_P.mean(), slope_L)
    return scores_L - scores_L.mean()


def _against(found: Tensor, scale: Tensor) -> float:
    """‖found‖ in units of another gradient's."""
    return float(found.norm() / scale.norm())
