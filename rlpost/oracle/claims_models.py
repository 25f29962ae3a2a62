"""Claims on real models: the same expectations through `Policy.forward`, against the model's own plain forward pass.

A family whose norms and rotations compute in float32 whatever its weights are has that much less to be exact to.
"""

from __future__ import annotations

import torch

from rlpost.objectives import advantages, credit
from rlpost.objectives.credit import Steps
from rlpost.objectives.surrogates import clipped_surrogate
from rlpost.oracle import truth
from rlpost.oracle.claims_credit import gradient
from rlpost.oracle.claims_kl import reward_rows
from rlpost.oracle.claims_turns import Episodes, turn_gae_row, turn_leave_one_out_row
from rlpost.oracle.estimators import ascent, group_gradient
from rlpost.oracle.policies import TinyModel
from rlpost.oracle.problem import Problem, relative_error
from rlpost.oracle.report import EXACT, Row, Section, exact, skipped

TOLERANCE = {"gpt2": EXACT, "llama": 1e-6}
"""By family."""
MOST_TOKENS = 20_000
"""Tokens of all leaves that a real model is asked for."""
TOOL = (1, 0)
"""What an environment says after the first action; a 0 of its own ends nothing."""


def model_section(problem: Problem, seed: int) -> Section:
    """Tiny models of two architectures, with and without a tool's turn inside the completions."""
    title = "through a real model's forward pass: relative errors"
    tokens = problem.tree.rows.actions
    if tokens > MOST_TOKENS:
        return Section(title, (skipped("tiny GPT-2 and Llama", f"{tokens} tokens of completions"),))
    if problem.tree.vocabulary == 2:
        # A chain of states has next to no gradient left where float32 leaves its 1e-8.
        return Section(title, (skipped("tiny GPT-2 and Llama", "a vocabulary of 2 makes a chain, not a tree"),))
    rows = [row for family in TOLERANCE for row in _family_rows(problem, family, seed)]
    return Section(title, tuple(rows))


def _family_rows(problem: Problem, family: str, seed: int) -> list[Row]:
    """What holds on a table holds for shared weights, since it is linear in ∇logp; here the program's own ∇logp."""
    tolerance, tree = TOLERANCE[family], problem.tree
    plain = Problem(tree, TinyModel(tree, family, seed), problem.reward_L, problem.reference_XV)
    tooled = Problem(tree, TinyModel(tree, family, seed, TOOL), problem.reward_L, problem.reference_XV)
    first_N = torch.zeros(tree.rows.actions, dtype=torch.bool).index_fill(0, tree.rows.start_S, True)
    episodes = Episodes(tooled, Steps(tree.rows, first_N))
    logp_L = truth.leaf_logp(tree, plain.logp_XV.detach())
    rows = [
        exact(
            "log-probability of every completion",
            relative_error(tree.rows.sum(plain.old_N), logp_L),
            "exact",
            tolerance,
        ),
        _leave_one_out(plain, "leave_one_out, sequence_sum, G=2", tolerance),
        _leave_one_out(tooled, "leave_one_out across a tool's turn", tolerance),
        _clipped(plain, tolerance),
        _gae(plain, "GAE with the true V, λ=0.95", tolerance),
        _gae(tooled, "GAE across a tool's turn", tolerance),
        turn_gae_row(episodes, "turn_gae with the true V, across a tool's turn", tolerance),
        turn_leave_one_out_row(episodes, "turn_leave_one_out across a tool's turn", tolerance),
        *reward_rows(plain, tolerance)[:3],
    ]
    return [Row(f"{family}: {row.name}", row.value, row.expected, row.verdict, row.ok) for row in rows]


def _leave_one_out(problem: Problem, name: str, tolerance: float) -> Row:
    sets = problem.groups(2)
    if sets is None:
        return skipped(name, "too many groups")
    advantage_PG = advantages.leave_one_out(problem.reward_L[sets.leaf_PG])
    found = group_gradient(problem, sets, advantage_PG, "sequence_sum")
    return exact(name, relative_error(found, problem.reward_gradient), "exact, scale 1", tolerance)


def _gae(problem: Problem, name: str, tolerance: float) -> Row:
    tree = problem.tree
    placed_N = credit.reward_on_last_action(problem.reward_L, tree.rows)
    advantage_N, _ = credit.gae(placed_N, problem.value_X[tree.state_N], tree.rows, gamma=1.0, gae_lambda=0.95)
    return exact(name, relative_error(gradient(problem, advantage_N), problem.reward_gradient), tolerance=tolerance)


def _clipped(problem: Problem, tolerance: float) -> Row:
    rows = problem.tree.rows
    advantage_N = rows.spread(problem.reward_L - problem.value_X[0])
    weight_N = rows.spread(problem.probability_L)
    found = problem.expected_gradient(
        ascent(clipped_surrogate, problem.old_N, problem.old_N, advantage_N, rows, weight_N)
    )
    return exact("clipped_surrogate on-policy", relative_error(found, problem.reward_gradient), tolerance=tolerance)
