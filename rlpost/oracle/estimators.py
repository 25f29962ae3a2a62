"""Expected gradients of the estimators in `rlpost.objectives`, called as stages call them.

A gradient estimate is Σ coefficient·∇logp over sampled actions. Its expectation is therefore the probability-weighted
sum of the coefficients over everything that can be sampled, followed by one backward pass.

Axes: N actions of all leaves, L leaves; P sampled groups, G members, M = P·G completions, A their actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlpost.objectives.ragged import Ragged
from rlpost.objectives.surrogates import policy_gradient
from rlpost.objectives.weights import weigh
from rlpost.oracle.multisets import Multisets
from rlpost.oracle.problem import Problem
from rlpost.oracle.tree import Tree

Surrogate = Callable[[Tensor, Tensor, Tensor, Ragged], Tensor]
"""(logp, old_logp, advantage, rows) -> loss per action."""
MOST_CALLS = 4000
"""Calls of a function that must see one group at a time."""


@dataclass(frozen=True)
class Drawn:
    """Groups with their actions one after the other, as a stage has them."""

    tree: Tree
    sets: Multisets

    @cached_property
    def rows(self) -> Ragged:
        """Which of the A actions belongs to which of the M completions."""
        return Ragged(self.tree.length_L[self.sets.leaf_PG.flatten()])

    @cached_property
    def action_A(self) -> Tensor:
        """[A] which of the N actions of all leaves it is."""
        first_M = self.tree.rows.start_S[self.sets.leaf_PG.flatten()] - self.rows.start_S
        return self.rows.spread(first_M) + torch.arange(self.rows.actions)

    def expected(self, coefficient_A: Tensor) -> Tensor:
        """[N] coefficients of each action, weighted with the groups' probabilities."""
        group_M = self.sets.probability_P.repeat_interleave(self.sets.leaf_PG.shape[1])
        zeros_N = coefficient_A.new_zeros(self.tree.rows.actions)
        return zeros_N.index_add(0, self.action_A, coefficient_A * self.rows.spread(group_M))


def ascent(
    surrogate: Surrogate,
    logp_N: Tensor,
    old_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    weight_N: Tensor | float = 1.0,
) -> Tensor:
    """[N] coefficients of ∇logp along which Σ loss·weight falls."""
    moving_N = logp_N.detach().requires_grad_()
    loss = (surrogate(moving_N, old_N, advantage_N, rows) * weight_N).sum()
    return -torch.autograd.grad(loss, moving_N)[0]


def descent(loss: Callable[[Tensor], Tensor], logp_N: Tensor, weight_N: Tensor) -> Tensor:
    """[N] coefficients of ∇logp along which Σ loss·weight rises, for a term per action that is to be small."""
    moving_N = logp_N.detach().requires_grad_()
    return torch.autograd.grad((loss(moving_N) * weight_N).sum(), moving_N)[0]


def group_gradient(problem: Problem, sets: Multisets, advantage_PG: Tensor, weight: str) -> Tensor:
    """[F] expected gradient of a group estimator: each group is an update of its own.

    The policy gradient is linear in the advantage, so each leaf's expected advantage·weight stands for all groups.
    """
    tree = problem.tree
    weight_PG = member_weights(weight, tree.length_L[sets.leaf_PG], tree.depth)
    share_PG = sets.probability_P[:, None] * advantage_PG * weight_PG
    advantage_L = share_PG.new_zeros(tree.leaves).index_add(0, sets.leaf_PG.flatten(), share_PG.flatten())
    advantage_N = tree.rows.spread(advantage_L)
    return problem.expected_gradient(ascent(policy_gradient, problem.old_N, problem.old_N, advantage_N, tree.rows))


def member_weights(weight: str, length_PG: Tensor, longest: int) -> Tensor:
    """[P, G] the weight of each of a member's actions, where every group is a whole update."""

    def of_group(lengths_1G: Tensor) -> Tensor:
        rows = Ragged(lengths_1G[0])
        return weigh(weight, rows, rows.actions, rows.learned, longest)[rows.start_S][None]

    found = one_by_one(of_group, length_PG)
    assert found is not None, "lengths are few"
    return found


def one_by_one(function: Callable[[Tensor], Tensor], x_PG: Tensor) -> Tensor | None:
    """[P, G] `function` on each group alone, [1, G], once for groups that are alike; None if they are too many.

    For functions that would mix the groups of one call, which here are different draws of one and the same update.
    """
    # A number for each row, in the base of how many values there are: rows themselves would take long to sort.
    value_V, digit_PG = torch.unique(x_PG, return_inverse=True)
    assert len(value_V) ** x_PG.shape[1] < 2**62
    row_P = torch.zeros_like(digit_PG[:, 0])
    for digit_P in digit_PG.unbind(1):
        row_P = row_P * len(value_V) + digit_P
    row_K, which_P = torch.unique(row_P, return_inverse=True)
    if len(row_K) > MOST_CALLS:
        return None
    example_K = torch.zeros_like(row_K).index_copy(0, which_P, torch.arange(len(which_P)))
    return torch.cat([function(x_1G) for x_1G in x_PG[example_K][:, None]])[which_P]
