"""Claims about a surrogate that fits a group to a target: its slope, where that is 0, and what it follows on average.

Axes: P groups, G members, N actions of all leaves, A those of one group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlpost.objectives.advantages import group_normalised
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.target_policy import target_policy
from rlpost.objectives.weights import sequence_mean
from rlpost.oracle.estimators import MOST_CALLS, ascent
from rlpost.oracle.problem import SIZES, Problem, cosine
from rlpost.oracle.report import Numbers, Row, Section, biased, exact

ETA = 0.7
SHOWN = 50
"""Groups of a size whose slopes are compared one by one."""


def target_section(problem: Problem) -> Section:
    """Target policy optimisation, over groups of 2 and of 3 completions of one prompt."""
    found = [_Groups.of(problem, size) for size in SIZES]

    def each(number: Callable[[_Groups], float], *, shown: bool = True) -> Numbers:
        return [None if groups is None else number(groups.some() if shown else groups) for groups in found]

    rows: list[Row] = [
        exact("target_policy: slope of each completion", each(_Groups.slope), "p − q, written out"),
        exact("target_policy: slope where p is the target", each(_Groups.at_target), "0: it stops there"),
        exact("target_policy, on-policy: slope of a group of equal rewards", each(_Groups.without_signal), "0"),
        biased(
            "target_policy, on-policy, against E[r]",
            each(_Groups.against_reward, shown=False),
            "biased by spread and likelihood",
        ),
    ]
    sizes = " / ".join(f"G={size}" for size in SIZES)
    return Section(
        f"surrogates of a group, {sizes}: error where exact, cosine with the truth where biased", tuple(rows)
    )


class _Groups:
    """Groups of one size, drawn from the reference unless said otherwise; each is an update of its own."""

    def __init__(self, problem: Problem, leaf_PG: Tensor, probability_P: Tensor) -> None:
        self.problem = problem
        self.leaf_PG, self.probability_P = leaf_PG, probability_P
        self.advantage_PG = group_normalised(problem.reward_L[leaf_PG])

    @staticmethod
    def of(problem: Problem, size: int) -> _Groups | None:
        """None where they are too many."""
        sets = problem.groups(size)
        if sets is None or len(sets.leaf_PG) > MOST_CALLS:
            return None
        return _Groups(problem, sets.leaf_PG, sets.probability_P)

    def some(self) -> _Groups:
        """At most about SHOWN of them, from short completions to long ones."""
        every = -(-len(self.leaf_PG) // SHOWN)
        return _Groups(self.problem, self.leaf_PG[::every], self.probability_P[::every])

    def slope(self) -> float:
        """The slope by a completion's log-probability, against exponentials of the leaves' own."""
        p_PG = self._share(self.problem.old_N)
        tilted_PG = self._share(self.problem.reference_N) * (self.advantage_PG / ETA).exp()
        found_PG = self._slopes(self.problem.old_N, self.problem.reference_N, self.advantage_PG)
        return float((found_PG - (p_PG - tilted_PG / tilted_PG.sum(1, keepdim=True))).abs().max())

    def at_target(self) -> float:
        """Each completion's log-probability moved by A/η, spread over its actions."""
        return float(self._slopes(None, self.problem.reference_N, self.advantage_PG).abs().max())

    def without_signal(self) -> float:
        """The policy is the one that sampled, and no advantage differs from 0."""
        old_N = self.problem.old_N
        return float(self._slopes(old_N, old_N, torch.zeros_like(self.advantage_PG)).abs().max())

    def against_reward(self) -> float:
        """The expected gradient of groups that the policy itself samples."""
        old_N, rows = self.problem.old_N, self.problem.tree.rows
        slope_PG = self._slopes(old_N, old_N, self.advantage_PG)
        share_PG = self.probability_P[:, None] * slope_PG
        slope_L = old_N.new_zeros(rows.completions).index_add(0, self.leaf_PG.flatten(), share_PG.flatten())
        return cosine(self.problem.expected_gradient(-rows.spread(slope_L)), self.problem.reward_gradient)

    def _share(self, logp_N: Tensor) -> Tensor:
        """[P, G] each member's probability, over the sum of its group's."""
        p_PG = self.problem.tree.rows.sum(logp_N).exp()[self.leaf_PG]
        return p_PG / p_PG.sum(1, keepdim=True)

    def _slopes(self, logp_N: Tensor | None, old_N: Tensor, advantage_PG: Tensor) -> Tensor:
        """[P, G] of the loss of each group by its members' log-probabilities; None: the policy that is the target."""
        rows_N, found = self.problem.tree.rows, []
        pieces = rows_N.start_S.tolist(), rows_N.lengths_S.tolist()
        for leaf_G, advantage_G in zip(self.leaf_PG.tolist(), advantage_PG, strict=True):
            index_A = torch.cat([torch.arange(pieces[0][leaf], pieces[0][leaf] + pieces[1][leaf]) for leaf in leaf_G])
            rows = Ragged([pieces[1][leaf] for leaf in leaf_G])
            advantage_A, old_A = rows.spread(advantage_G), old_N[index_A]
            moved_A = old_A + advantage_A / ETA / rows.spread(rows.lengths_S.double())
            new_A = moved_A if logp_N is None else logp_N[index_A]
            found.append(-ascent(_with_eta, new_A, old_A, advantage_A, rows, sequence_mean(rows))[rows.start_S])
        return torch.stack(found)


def _with_eta(logp_N: Tensor, old_N: Tensor, advantage_N: Tensor, rows: Ragged) -> Tensor:
    return target_policy(logp_N, old_N, advantage_N, rows, eta=ETA)
