"""Claims about potential-based shaping: rewards γΦ(s′) − Φ(s) between states, on top of the task's.

Axes: X states, V tokens, L leaves, N actions of all leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives import credit
from rlpost.oracle import truth
from rlpost.oracle.claims_credit import gradient
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import EXACT, Row, Section, exact, holds


def shaping_section(problem: Problem) -> Section:
    """Ng, Harada and Russell (1999): with Φ = 0 at the end no optimum moves, without it it may."""
    potential_X = torch.frac((torch.arange(problem.tree.states).double() + 1) * 0.7548776662466927)
    return Section("potential-based shaping, γ = 1", tuple(_rows(problem, potential_X)))


def _rows(problem: Problem, potential_X: Tensor) -> list[Row]:
    """Along a completion the potentials cancel but for the first, which no action has a part in.

    So the best values fall by Φ in every state, the same actions stay best, and the gradient is what it was. A
    potential that remains at the end is a reward: here one that turns the order of all completions around.
    """
    tree, reward_L = problem.tree, problem.reward_L
    plain_XV = _best(problem, torch.zeros_like(problem.old_N))
    shaped_N = shaping(problem, potential_X, torch.zeros_like(reward_L))
    shaped_XV = _best(problem, shaped_N)
    values = relative_error(shaped_XV.amax(1), plain_XV.amax(1) - potential_X)
    # Of several best actions, rounding picks one: so its worth is compared, not its number.
    chosen_X = plain_XV.gather(1, shaped_XV.argmax(1, keepdim=True))[:, 0]
    same = bool((plain_XV.amax(1) - chosen_X <= EXACT).all())
    to_go_N = credit.return_to_go(credit.reward_on_last_action(reward_L, tree.rows) + shaped_N, tree.rows)
    error = relative_error(gradient(problem, to_go_N), problem.reward_gradient)
    moved_XV = _best(problem, shaping(problem, potential_X, -2 * reward_L))
    gap = float(reward_L.max() - reward_L[tree.leaf_by(moved_XV.argmax(1))])
    return [
        exact("best value of every state against V* − Φ", values),
        holds("best action in every state", "as good" if same else "worse", "as good without", same),
        exact("policy gradient with shaped rewards", error),
        holds("Φ ≠ 0 at the end: reward lost at the optimum", f"{gap:.4f}", "> 0", gap > EXACT, "moved, as expected"),
    ]


def shaping(problem: Problem, potential_X: Tensor, end_L: Tensor) -> Tensor:
    """[N] Φ(state after the action) − Φ(state before it); `end_L` is Φ where a completion has ended."""
    tree = problem.tree
    after_N = torch.cat([potential_X[tree.state_N[1:]], end_L[-1:]])
    after_N[tree.rows.last] = end_L
    return after_N - potential_X[tree.state_N]


def _best(problem: Problem, shaped_N: Tensor) -> Tensor:
    """[X, V] the best that can follow each action, its own shaping reward included."""
    tree = problem.tree
    shaped_XV = torch.zeros_like(problem.reference_XV)
    shaped_XV[tree.state_N, tree.token_N] = shaped_N
    best_X = truth.backwards(tree, problem.reward_L, lambda level, after: (after + shaped_XV[level]).amax(1))
    return truth.action_values(tree, best_X, problem.reward_L) + shaped_XV
