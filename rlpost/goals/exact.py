"""Exact quantities of goals on a token tree: reached leaves, the posterior, guided policies.

Axes: X states, V tokens, L leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlpost.goals.goal_set import Goal
from rlpost.goals.guide import Guide, Position
from rlpost.oracle import truth
from rlpost.oracle.tree import END, Tree


def reached(tree: Tree, goal: Goal, *, truncated_counts: bool = False) -> Tensor:
    """[L] 1 for leaves that end in the goal, else 0."""
    found = []
    for ids, cut in zip(torch.split(tree.token_N, tree.length_L.tolist()), tree.cut_L.tolist(), strict=True):
        written = ids.tolist() if cut else ids.tolist()[:-1]
        found.append(float((truncated_counts or not cut) and goal.reached(written)))
    return torch.tensor(found, dtype=torch.float64)


def posterior(tree: Tree, logp_XV: Tensor, reached_L: Tensor) -> Tensor:
    """[L] probability of every completion given that it ends in the goal."""
    joint_L = truth.leaf_logp(tree, logp_XV).exp() * reached_L
    return joint_L / joint_L.sum()


def guided(tree: Tree, logp_XV: Tensor, guide: Guide) -> Tensor:
    """[X, V] log-probabilities of the guided policy in every state it can reach; the policy's own elsewhere."""
    weight_XV = torch.zeros_like(logp_XV)
    states = positions(tree)
    alive_X = torch.zeros(tree.states, dtype=torch.bool)
    alive_X[0] = True
    for level in reversed(list(tree.levels())):
        here = [x for x in range(level.start, level.stop) if alive_X[x]]
        if here:
            weight_XV[here] = guide.log_weights(logp_XV[here], [states[x] for x in here])
        if level.stop < tree.states:
            width = (level.stop - level.start) * (tree.vocabulary - 1)
            open_ = (weight_XV[level, 1:] > -torch.inf) & alive_X[level, None]
            alive_X[level.stop : level.stop + width] = open_.flatten()
    return (logp_XV + weight_XV).log_softmax(1)


def positions(tree: Tree) -> list[Position]:
    """Every state as a decoder's position."""
    prefixes = [p for t in range(tree.depth) for p in tree.prefixes(t).tolist()]
    return [Position((), tuple(p), len(p) == tree.depth - 1) for p in prefixes]


def from_table(tree: Tree, log_X: Tensor) -> Callable[[Sequence[Position], Tensor], Tensor]:
    """`LogWeights` for a `Guide`, from a table with a number for every state."""
    number = {p.ids: x for x, p in enumerate(positions(tree))}

    def ahead(rows: Sequence[Position], candidate_BK: Tensor) -> Tensor:
        found = [
            [0.0 if row.last or token == END else float(log_X[number[(*row.ids, token)]]) for token in candidates]
            for row, candidates in zip(rows, candidate_BK.tolist(), strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64)

    return ahead
