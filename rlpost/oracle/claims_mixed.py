"""Claims about losses that stand beside a policy gradient in one update: of an expert's rows.

The expert is the reference: its completions are what is learned beside the policy's own samples.

Axes: X states, V tokens, L leaves, N actions of all leaves, P groups, G members.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rlpost.objectives import advantages, supervised
from rlpost.objectives.mixing import expert_weight
from rlpost.oracle import truth
from rlpost.oracle.estimators import descent, group_gradient
from rlpost.oracle.problem import SIZES, Problem, relative_error
from rlpost.oracle.report import Row, Section, exact

SHARE = partial(expert_weight, peak=0.9, valley=0.1, warmup_steps=2, decay_steps=4)


def mixed_section(problem: Problem) -> Section:
    """An expert's rows beside the policy's own samples."""
    rows = [_expert_row(problem), _schedule_row(), *_confidence_rows(problem)]
    return Section("surrogates, and losses beside them: relative error", tuple(rows))


def _expert_row(problem: Problem) -> Row:
    """Of (1 − μ)·E[r] + μ·(expected log-likelihood of the expert), which is −KL(expert || policy) and a constant."""
    tree = problem.tree
    mu = SHARE(3)
    given_N = tree.rows.spread(truth.leaf_logp(tree, problem.reference_XV).exp())
    learned = -problem.expected_gradient(descent(supervised.nll, problem.old_N, given_N))

    def mixed(logp_XV: Tensor) -> Tensor:
        reward = truth.values(tree, logp_XV, problem.reward_L)[0]
        return (1 - mu) * reward - mu * truth.kl(tree, problem.reference_XV, logp_XV)

    true = problem.true_gradient(mixed)
    errors: list[float | None] = []
    for size in SIZES:
        sets = problem.groups(size)
        if sets is None:
            errors.append(None)
            continue
        own = group_gradient(problem, sets, advantages.leave_one_out(problem.reward_L[sets.leaf_PG]), "sequence_sum")
        errors.append(relative_error((1 - mu) * own + mu * learned, true))
    return exact("leave_one_out, beside nll of an expert", errors, "(1 − μ)·∇E[r] + μ·∇E[log π(expert)]")


def _schedule_row() -> Row:
    """The rise and the fall, by hand: cos(π/4) = √½ and cos(3π/4) = −√½."""
    found = torch.tensor([SHARE(t) for t in range(8)], dtype=torch.float64)
    half = 0.5**0.5
    by_hand = [0.0, 0.45, 0.9, 0.5 + 0.4 * half, 0.5, 0.5 - 0.4 * half, 0.1, 0.1]
    return exact("expert_weight", relative_error(found, torch.tensor(by_hand, dtype=torch.float64)), "by hand")


def _confidence_rows(problem: Problem) -> list[Row]:
    tree = problem.tree
    given_N = tree.rows.spread(truth.leaf_logp(tree, problem.reference_XV).exp())
    p_N = problem.old_N.exp()
    slope_N = descent(supervised.confidence_weighted, problem.old_N, torch.ones_like(p_N))
    found = problem.expected_gradient(descent(supervised.confidence_weighted, problem.old_N, given_N))

    def cost(logp_XV: Tensor) -> Tensor:
        moving_N = problem.at_actions(logp_XV).exp()
        return (given_N * (0.5 * moving_N**2 - moving_N)).sum()

    return [
        exact("confidence_weighted: coefficient of ∇logp", relative_error(slope_N, -p_N * (1 - p_N)), "by hand", 1e-10),
        exact("confidence_weighted of an expert", relative_error(found, problem.true_gradient(cost)), "∇(p²/2 − p)"),
    ]
