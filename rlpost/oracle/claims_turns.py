"""Claims about credit over turns: rewards at the ends of turns, with the whole tree as the sample.

A turn's reward is of the tokens up to its end, and the truth is the gradient of the expected sum of rewards. A turn has
two actions, the last one of a completion perhaps one; through a real model, the first action is a turn, and all after
what a tool says.

Axes: X states, L leaves, N actions of all leaves, K turns of all leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from rlpost.objectives import credit, turns
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.surrogates import policy_gradient
from rlpost.oracle.claims_credit import GROUPS, LAMBDAS, WRONG, earned, gradient, steps_of_two
from rlpost.oracle.estimators import Drawn, ascent
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import EXACT, Row, Section, biased, exact
from rlpost.oracle.tree import END

Advantage = Callable[[Tensor, credit.Steps, Tensor, int], Tensor]
"""(reward of each turn, the turns, the state each begins in, completions a group) -> [N] advantage."""


@dataclass(frozen=True)
class Episodes:
    """Every completion of a tree as an episode of turns."""

    drawn: Problem
    """Whose policy draws them."""
    steps: credit.Steps
    """The turns."""

    @cached_property
    def reward_K(self) -> Tensor:
        """[K]."""
        return earned(self.drawn.prefix_N[self.steps.last_K])

    @cached_property
    def problem(self) -> Problem:
        """The same tree, rewarded with each completion's sum."""
        return self.drawn.rewarded(Ragged(self.steps.count_S).sum(self.reward_K))

    @cached_property
    def value_N(self) -> Tensor:
        """[N] true value before each action of the rewards that are still to come."""
        rows = self.problem.tree.rows
        placed_N = credit.on_last(self.reward_K, self.steps)
        before_N = rows.spread(rows.sum(placed_N)) - credit.return_to_go(placed_N, rows)
        return self.problem.value_X[self.problem.tree.state_N] - before_N


def turn_section(problem: Problem) -> Section:
    """A critic's turns and tokens, then groups."""
    episodes = Episodes(problem, steps_of_two(problem.tree.rows))
    rows = [*_critic_rows(episodes), *_limit_rows(episodes), *_group_rows(episodes), _joined_row(problem)]
    return Section("credit over turns: relative error where exact, cosine with the truth where biased", tuple(rows))


def turn_gae_row(episodes: Episodes, name: str, tolerance: float = EXACT) -> Row:
    """Every λ is exact with the true V."""
    found = [_by_turn(episodes, episodes.value_N, lam) for lam in LAMBDAS]
    errors = [relative_error(x, episodes.problem.reward_gradient) for x in found]
    return exact(name, errors, "exact for every λ", tolerance)


def turn_leave_one_out_row(episodes: Episodes, name: str, tolerance: float = EXACT) -> Row:
    """Exact, whatever the size of a group."""
    found = [_of_groups(episodes, _leave_one_out, size) for size in SIZES]
    true = episodes.problem.reward_gradient
    errors = [None if x is None else relative_error(x, true) for x in found]
    return exact(f"{name}, {GROUPS}", errors, "exact, scale 1", tolerance)


def _by_turn(episodes: Episodes, value_N: Tensor, lam: float) -> Tensor:
    steps = episodes.steps
    advantage_N, _ = turns.turn_gae(episodes.reward_K, value_N[steps.first_K], steps, gae_lambda=lam)
    return gradient(episodes.problem, advantage_N)


def _critic_rows(episodes: Episodes) -> list[Row]:
    """V before a turn is settled before all of its actions, so that it is a baseline to each of them."""
    problem, steps = episodes.problem, episodes.steps
    true, wrong_N = problem.reward_gradient, torch.full_like(episodes.value_N, WRONG)
    placed_N = credit.on_last(episodes.reward_K, steps)
    tokens = [
        gradient(problem, credit.gae(placed_N, episodes.value_N, problem.tree.rows, gae_lambda=lam)[0])
        for lam in LAMBDAS
    ]
    listed, below = ("/".join(f"{lam:g}" for lam in some) for some in (LAMBDAS, LAMBDAS[:-1]))
    wrong = [_by_turn(episodes, wrong_N, lam) for lam in LAMBDAS]
    return [
        turn_gae_row(episodes, f"turn_gae with the true V, λ={listed}"),
        exact(f"turn_gae with V={WRONG} everywhere, λ=1", relative_error(wrong[-1], true)),
        biased(f"turn_gae with V={WRONG} everywhere, λ={below}", [cosine(x, true) for x in wrong[:-1]]),
        exact(
            f"GAE by token, rewards at the ends of turns, true V, λ={listed}",
            [relative_error(x, true) for x in tokens],
            "exact for every λ",
        ),
    ]


def _limit_rows(episodes: Episodes) -> list[Row]:
    """A value after the limit is a reward paid there; with λ = 1, A + V is the return from the turn on."""
    steps, reward_K, tree = episodes.steps, episodes.reward_K, episodes.problem.tree
    beyond_L = torch.where(tree.cut_L, episodes.drawn.reward_L.cos(), 0.0)
    paid = episodes.problem.rewarded(episodes.problem.reward_L + beyond_L)
    value_N = episodes.value_N + (paid.value_X - episodes.problem.value_X)[tree.state_N]
    advantage_N, _ = turns.turn_gae(reward_K, value_N[steps.first_K], steps, bootstrap_S=beyond_L)
    _, return_K = turns.turn_gae(reward_K, value_N[steps.first_K].sin(), steps, gae_lambda=1.0)
    to_go_K = credit.process(reward_K, steps, how="last")[steps.first_K]
    limit = relative_error(gradient(paid, advantage_N), paid.reward_gradient)
    return [
        exact("turn_gae bootstrapped at the length limit, λ=0.95", limit, "exact for r + V beyond the limit"),
        exact("turn_gae(1, 1) + V against the return from the turn on", relative_error(return_K, to_go_K)),
    ]


def _group_rows(episodes: Episodes) -> list[Row]:
    """The others' mean is settled before an action is drawn; a mean that the action has part in is not."""
    true = episodes.problem.reward_gradient

    def direction(name: str, advantage: Advantage) -> Row:
        found = [_of_groups(episodes, advantage, size) for size in SIZES]
        return biased(f"{name}, {GROUPS}", [None if x is None else cosine(x, true) for x in found])

    return [
        turn_leave_one_out_row(episodes, "turn_leave_one_out, sequence_sum"),
        direction("turn_normalised, sequence_sum", lambda r, steps, _, size: turns.turn_normalised(r, steps, size)),
        direction("gigpo, sequence_sum", turns.gigpo),
        direction("gigpo without std, sequence_sum", partial(turns.gigpo, std=False)),
    ]


def _joined_row(problem: Problem) -> Row:
    """Where an end token belongs to the step before it, it decides itself which step it is in."""
    tree, apart = problem.tree, steps_of_two(problem.tree.rows)
    before_end_K = torch.isin(apart.last_K + 1, apart.first_K[tree.token_N[apart.first_K] == END])
    inside_K = ~torch.isin(apart.last_K, tree.rows.last)
    ends_N = torch.zeros(tree.rows.actions, dtype=torch.bool)
    ends_N[apart.last_K[~(before_end_K & inside_K)]] = True
    joined = Episodes(problem, credit.Steps(tree.rows, ends_N))
    found = [_of_groups(joined, _leave_one_out, size) for size in SIZES]
    true = joined.problem.reward_gradient
    name = f"turn_leave_one_out, the end token in the step before it, {GROUPS}"
    return biased(name, [None if x is None else cosine(x, true) for x in found])


def _leave_one_out(reward_K: Tensor, steps: credit.Steps, _: Tensor, size: int) -> Tensor:
    return turns.turn_leave_one_out(reward_K, steps, size)


def _of_groups(episodes: Episodes, advantage: Advantage, size: int) -> Tensor | None:
    """[F] expected gradient of groups of `size`, summed over a completion; None where they are too many."""
    problem = episodes.problem
    sets = problem.groups(size)
    if sets is None:
        return None
    drawn = Drawn(problem.tree, sets)
    ends_N = torch.zeros(problem.tree.rows.actions, dtype=torch.bool).index_fill(0, episodes.steps.last_K, True)
    steps = credit.Steps(drawn.rows, ends_N[drawn.action_A])
    last_K, first_K = drawn.action_A[steps.last_K], drawn.action_A[steps.first_K]
    reward_K = earned(problem.prefix_N[last_K])
    advantage_A = advantage(reward_K, steps, problem.tree.state_N[first_K], size)
    logp_A = problem.old_N[drawn.action_A]
    coefficient_A = ascent(policy_gradient, logp_A, logp_A, advantage_A, drawn.rows, 1 / size)
    return problem.expected_gradient(drawn.expected(coefficient_A))
