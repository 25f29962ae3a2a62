"""Claims about learning by comparison with another policy: Nash-MD's game, and XPO's bonus.

The game: the policy is rewarded with the probability that its completion is preferred to the other one's, less τ·KL to
the reference μ. Its equilibrium meets itself, π ∝ μ·exp(P(· ≻ π)/τ). Preferences here go in a circle, so that no
completion is the best one.

Axes: X states, V tokens, L leaves, P groups, G members.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlpost.objectives.advantages import leave_one_out
from rlpost.objectives.kl import k1
from rlpost.objectives.online import exploration, preferred, towards_reference
from rlpost.objectives.surrogates import policy_gradient
from rlpost.oracle import truth
from rlpost.oracle.estimators import ascent, descent, group_gradient
from rlpost.oracle.policies import Table
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import EXACT, Row, Section, biased, exact, holds, skipped

TAU, SHARE, BETA, SCALE = 0.3, 0.4, 0.5, 0.7
PACES = (0.4, 0.2, 0.1)
"""η of the mirror descent, halved twice."""
STEPS = 900
SETTLED = 1e-9
"""Relative error that an iteration may leave."""
MOST_LEAVES = 150
"""Completions of a game that is solved."""


def online_section(problem: Problem) -> Section:
    """What a completion is compared with, and what that is the gradient of."""
    rows = [*_contest_rows(problem), *_game_rows(problem), *_mixture_rows(problem), *_exploration_rows(problem)]
    sizes = " / ".join(f"G={size}" for size in SIZES)
    title = f"group estimators against another policy, {sizes}: relative error where exact, cosine where biased"
    return Section(title, tuple(rows))


def _contest_rows(problem: Problem) -> list[Row]:
    """Whom the policy meets stands still: the gradient is of the policy's own part in the preference."""
    tree, reward_L = problem.tree, problem.reward_L
    other_L = truth.leaf_logp(tree, _mixture(problem, SHARE)).exp()
    strength_L = (reward_L / SCALE).exp()
    likely_LL = strength_L[:, None] / (strength_L[:, None] + strength_L)
    better_LL = (reward_L[:, None] > reward_L).double() + 0.5 * (reward_L[:, None] == reward_L).double()

    def found(kind: Literal["bradley_terry", "step"], true_LL: Tensor, size: int) -> float | None:
        sets = problem.groups(size)
        if sets is None:
            return None
        # One completion is met at a time; the mean over it is the expectation.
        each_LL = [preferred(reward_L[None], r.view(1, 1), preference=kind, scale=SCALE)[0] for r in reward_L]
        won_L = other_L @ torch.stack(each_LL)
        mean = group_gradient(problem, sets, leave_one_out(won_L[sets.leaf_PG]), "sequence_sum")
        true = problem.true_gradient(lambda logp_XV: truth.leaf_logp(tree, logp_XV).exp() @ true_LL @ other_L)
        return relative_error(mean, true)

    told, own = "exact for P(π ≻ the other), scale 1", problem.at_actions(problem.logp_XV.detach())
    alone_N = k1(own, problem.reference_N) * tree.rows.spread(problem.probability_L)
    return [
        exact(
            "preferred by bradley_terry, leave_one_out, sequence_sum",
            [found("bradley_terry", likely_LL, size) for size in SIZES],
            told,
        ),
        exact(
            "preferred by step, leave_one_out, sequence_sum",
            [found("step", better_LL, size) for size in SIZES],
            told,
        ),
        biased(
            "k1 in the reward, of each action alone",
            cosine(problem.expected_gradient(alone_N), problem.kl_gradient),
            "biased for KL(policy || reference): what follows is left out",
        ),
    ]


def _game_rows(problem: Problem) -> list[Row]:
    """The regularised equilibrium is where the estimator against oneself stands still; against a mixture, nearby.

    Nash-MD steps π ← m·exp(η·P(· ≻ m)), m ∝ π^(1−ητ)·μ^(ητ) over whole completions. It stands still where the
    estimator against m does, which is the equilibrium but for η, and each step nears that as its theorem says.
    """
    if problem.tree.leaves > MOST_LEAVES:
        return [skipped("preferences in a circle", f"more than {MOST_LEAVES} completions")]
    game = _Game(problem)
    nash_L = game.equilibrium()
    start = game.slope(game.mu_L, game.mu_L).norm()
    paths = [game.descent(nash_L, eta) for eta in PACES]
    still = [
        float(game.slope(path.last_L, game.mixture(path.last_L, eta)).norm() / start)
        for path, eta in zip(paths, PACES, strict=True)
    ]
    off = [path.distances[-1] for path in paths]
    quarter = all(0.15 < late / early < 0.35 for early, late in pairwise(off))
    name = "preferences in a circle"
    return [
        exact(
            f"{name}: expected gradient at the equilibrium, against itself",
            float(game.slope(nash_L, nash_L).norm() / start),
            "0",
            SETTLED,
        ),
        exact(f"{name}: expected gradient where Nash-MD ends, against its mixture", max(still), "0", SETTLED),
        holds(
            f"{name}: KL of the equilibrium to where Nash-MD ends, η = {' / '.join(f'{eta:g}' for eta in PACES)}",
            " / ".join(f"{x:.1e}" for x in off),
            "a bias of order η: a quarter of the KL at half of η",
            quarter,
            "biased, as expected",
        ),
        holds(
            f"{name}: KL after a step of Nash-MD, over (1 − ητ)·KL before + 2η²",
            f"{max(path.worst for path in paths):.2f} at most",
            "1 or less",
            all(path.worst <= 1 for path in paths),
        ),
    ]


class _Path(NamedTuple):
    """Where a mirror descent went."""

    last_L: Tensor
    distances: list[float]
    """KL of the equilibrium to the policy, before the first step and after each."""
    worst: float
    """The largest ratio of a step's KL to its bound."""


class _Game:
    """Completions of a tree that beat each other in a circle, nine times in ten."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.mu_L = truth.leaf_logp(problem.tree, problem.reference_XV).exp()
        leaves = torch.arange(problem.tree.leaves)
        ahead_LL = (leaves - leaves[:, None]) % len(leaves)
        won_LL = torch.where(ahead_LL * 2 < len(leaves), 0.9, 0.1).double().triu(1)
        self.won_LL = won_LL + (1 - won_LL.T).tril(-1) + 0.5 * torch.eye(len(leaves), dtype=torch.float64)
        """[L, L] probability that one is preferred to another."""

    def mixture(self, policy_L: Tensor, eta: float) -> Tensor:
        """[L] the geometric mixture of whole completions."""
        return ((1 - eta * TAU) * policy_L.log() + eta * TAU * self.mu_L.log()).softmax(0)

    def equilibrium(self) -> Tensor:
        """[L] π ∝ μ·exp(P(· ≻ π)/τ), by Newton's method, from a large τ to the game's."""
        logit_L = self.mu_L.log()
        one_LL = torch.eye(len(logit_L), dtype=torch.float64)
        for tau in [TAU * 2.0**k for k in range(6, 0, -1)] + [TAU] * 20:
            policy_L = logit_L.softmax(0)
            gap_L = logit_L - self.mu_L.log() - self.won_LL @ policy_L / tau
            spread_LL = torch.diag(policy_L) - policy_L[:, None] * policy_L
            logit_L = logit_L - torch.linalg.solve(one_LL - self.won_LL @ spread_LL / tau, gap_L)
        return logit_L.softmax(0)

    def descent(self, nash_L: Tensor, eta: float) -> _Path:
        """Nash-MD from the reference until it stands still."""
        policy_L, distances, worst = self.mu_L, [], 0.0
        for _ in range(STEPS):
            distances.append(float(nash_L @ (nash_L.log() - policy_L.log())))
            mixture_L = self.mixture(policy_L, eta)
            policy_L = (mixture_L.log() + eta * (self.won_LL @ mixture_L)).softmax(0)
            after = float(nash_L @ (nash_L.log() - policy_L.log()))
            worst = max(worst, after / ((1 - eta * TAU) * distances[-1] + 2 * eta**2))
        return _Path(policy_L, [*distances, after], worst)

    def slope(self, policy_L: Tensor, other_L: Tensor) -> Tensor:
        """[F] expected gradient of the policy that is rewarded for being preferred, less τ·k1, in groups of two."""
        tree = self.problem.tree
        at = Problem(
            tree, Table(tree, truth.conditional(tree, policy_L)), self.won_LL @ other_L, self.problem.reference_XV
        )
        reward_L = at.reward_L - TAU * tree.rows.sum(k1(at.old_N, at.reference_N))
        centred_L = reward_L - policy_L @ reward_L
        return at.expected_gradient(
            ascent(
                policy_gradient, at.old_N, at.old_N, tree.rows.spread(centred_L), tree.rows, tree.rows.spread(policy_L)
            )
        )


def _mixture(problem: Problem, share: float) -> Tensor:
    """[X, V] log-probabilities of what a stage's policy meets."""
    logp_XV = problem.logp_XV.detach()
    return (logp_XV + towards_reference(logp_XV, problem.reference_XV, share=share)).log_softmax(1)


def _mixture_rows(problem: Problem) -> list[Row]:
    """Token by token is not over whole completions, unless it is the reference itself."""
    tree = problem.tree
    token_L = truth.leaf_logp(tree, _mixture(problem, SHARE))
    whole_L = (1 - SHARE) * problem.probability_L.log() + SHARE * truth.leaf_logp(tree, problem.reference_XV)
    gap = float(token_L.exp() @ (token_L - whole_L.log_softmax(0)))
    return [
        exact(
            "towards_reference, share 1",
            float((_mixture(problem, 1.0) - problem.reference_XV).abs().max()),
            "the reference",
        ),
        holds(
            f"towards_reference, share {SHARE:g}: KL to the mixture of whole completions",
            f"{gap:.4f}",
            "> 0: each state is normalised by itself",
            gap > EXACT,
            "a gap, as expected",
        ),
    ]


def _exploration_rows(problem: Problem) -> list[Row]:
    """A policy π is the best one of rewards β·log(π/ref) + c, and its value V their mean under ref + β·KL(ref ‖ π).

    Pairs leave c free; where it holds that mean, XPO's bonus has the gradient −∇V/β: it believes in what π implies.
    """
    tree, reference_XV = problem.tree, problem.reference_XV
    reference_L = truth.leaf_logp(tree, reference_XV).exp()
    optimum_XV = truth.soft_optimum(tree, reference_XV, problem.reward_L, BETA)
    value = truth.soft_values(tree, reference_XV, problem.reward_L, BETA)[0]
    implied = reference_L @ problem.reward_L + BETA * truth.kl(tree, reference_XV, optimum_XV)
    met_N = torch.ones(tree.rows.actions, dtype=torch.bool)
    sampled_N = tree.rows.spread(reference_L)
    found = problem.expected_gradient(descent(lambda logp_N: exploration(logp_N, met_N), problem.old_N, sampled_N))
    true = problem.true_gradient(lambda logp_XV: BETA * truth.kl(tree, reference_XV, logp_XV))
    return [
        exact(
            "value that π* implies, mean of r under ref + β·KL(ref ‖ π*)",
            float((implied / value - 1).abs()),
            "V_soft(root)",
        ),
        exact("exploration, over samples of ref", relative_error(found, -true / BETA), "−∇V/β of the implied value"),
    ]
