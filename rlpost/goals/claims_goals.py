"""Claims about goals: values, guided decoding, and sequential Monte Carlo, on a table and its token tree.

Axes: X states, V tokens, L leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlpost.goals.exact import from_table, guided, positions, posterior, reached
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.guide import Guide, Mode, Position
from rlpost.goals.smc import twisted_smc
from rlpost.oracle import truth
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import Row, Section, exact, fact, holds
from rlpost.oracle.tree import END, Tree

BETA = 0.5
PARTICLES = 4
RUNS = 400
SIGMAS = 4.0
"""Standard errors that a mean of random runs may be off."""


def goal_section(problem: Problem, seed: int) -> Section:
    """What `rlpost verify goals` adds."""
    tree = problem.tree
    goal = some_goal(tree, seed)
    logp_XV = problem.logp_XV.detach()
    rows = [
        *_value_rows(tree, logp_XV, goal),
        *_guide_rows(tree, logp_XV, goal),
        *_particle_rows(tree, logp_XV, goal, seed),
    ]
    return Section("goals: a set of endings, values, guided decoding", tuple(rows))


def some_goal(tree: Tree, seed: int) -> GoalSet:
    """About a third of all endings of two tokens, at least one; and everything below one first token and the next.

    The latter makes subtrees in which every completion ends in the goal, where 1 − V is rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [(a, b) for a in range(1, tree.vocabulary) for b in range(1, tree.vocabulary)]
    chosen = torch.randperm(len(pairs), generator=generator)[: max(1, len(pairs) // 3)].tolist()
    return GoalSet([pairs[i] for i in chosen])


def _value_rows(tree: Tree, logp_XV: Tensor, goal: GoalSet) -> list[Row]:
    there_L = reached(tree, goal, truncated_counts=True)
    value_X = truth.values(tree, logp_XV, there_L)
    summed = truth.leaf_logp(tree, logp_XV).exp() @ there_L
    avoid_X = truth.values(tree, logp_XV, 1 - there_L)
    return [
        fact("endings, completions that end in one", f"{len(goal)}, {int(there_L.sum())} of {tree.leaves}"),
        exact("V(root) by recursion against the sum over completions", relative_error(value_X[:1], summed[None])),
        exact("S by its own recursion against 1 − V, largest difference", float((avoid_X - (1 - value_X)).abs().max())),
    ]


def _guide_rows(tree: Tree, logp_XV: Tensor, goal: GoalSet) -> list[Row]:
    there_L = reached(tree, goal, truncated_counts=True)
    value_X, avoid_X = (truth.values(tree, logp_XV, x) for x in (there_L, 1 - there_L))
    soft_X = truth.soft_values(tree, logp_XV, there_L, BETA)
    toward_L = _leaf(tree, logp_XV, goal, Mode.toward, value_X.log())
    away_L = _leaf(tree, logp_XV, goal, Mode.away, avoid_X.log())
    soft_L = _leaf(tree, logp_XV, goal, Mode.soft, soft_X / BETA)
    best_L = truth.leaf_logp(tree, truth.soft_optimum(tree, logp_XV, there_L, BETA)).exp()
    unsafe = float(truth.leaf_logp(tree, logp_XV).exp() @ there_L)
    return [
        exact(
            "toward, against the posterior given the goal", relative_error(toward_L, posterior(tree, logp_XV, there_L))
        ),
        exact(
            "away, against the posterior given not the goal",
            relative_error(away_L, posterior(tree, logp_XV, 1 - there_L)),
        ),
        exact("soft, against the optimum of E[r] − β·KL", relative_error(soft_L, best_L)),
        _zero("toward: mass on completions that miss", float(toward_L @ (1 - there_L))),
        _zero(f"away: mass on forbidden endings, {unsafe:.4f} before", float(away_L @ there_L)),
    ]


def _leaf(tree: Tree, logp_XV: Tensor, goal: GoalSet, mode: Mode, log_X: Tensor) -> Tensor:
    """[L] probabilities of completions under the guided policy, as the decoder makes it."""
    guide = Guide(from_table(tree, log_X), goal, {END}, mode, BETA, truncated_counts=True)
    return truth.leaf_logp(tree, guided(tree, logp_XV, guide)).exp()


def _zero(name: str, mass: float) -> Row:
    return holds(name, f"{mass:.1e}", "exactly 0", mass == 0.0)


def _particle_rows(tree: Tree, logp_XV: Tensor, goal: GoalSet, seed: int) -> list[Row]:
    """With the true V every particle's weight is V(root); with none at all the mean still is."""
    there_L = reached(tree, goal, truncated_counts=True)
    value_X = truth.values(tree, logp_XV, there_L)
    true = float(value_X[0])
    sharp = _estimates(tree, logp_XV, goal, value_X.log(), 3, seed)
    blind = _estimates(tree, logp_XV, goal, torch.zeros_like(value_X), RUNS, seed)
    # Where every run says the same, what is left is rounding.
    off = float((blind.mean() - true).abs() / max(float(blind.std()) / RUNS**0.5, 1e-12))
    return [
        exact("sequential Monte Carlo with the true V: its estimate of V(root)", float((sharp / true - 1).abs().max())),
        holds(f"the same without a value, mean of {RUNS} runs", f"{off:.2f} standard errors", "unbiased", off < SIGMAS),
    ]


def _estimates(tree: Tree, logp_XV: Tensor, goal: GoalSet, log_X: Tensor, runs: int, seed: int) -> Tensor:
    number = {p.ids: x for x, p in enumerate(positions(tree))}
    guide = Guide(from_table(tree, log_X), goal, {END}, truncated_counts=True)
    generator = torch.Generator().manual_seed(seed)

    def logp(rows: Sequence[Position]) -> Tensor:
        return logp_XV[[number[row.ids] for row in rows]]

    found = [
        twisted_smc(logp, guide, (), particles=PARTICLES, length=tree.depth, generator=generator).log_estimate
        for _ in range(runs)
    ]
    return torch.tensor(found, dtype=torch.float64).exp()
