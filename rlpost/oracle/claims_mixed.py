"""Claims about losses that stand beside a policy gradient in one update: of an expert's rows, of replies.

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
from rlpost.oracle.multisets import multisets
from rlpost.oracle.problem import SIZES, Problem, cosine, relative_error
from rlpost.oracle.report import Row, Section, biased, exact

SHARE = partial(expert_weight, peak=0.9, valley=0.1, warmup_steps=2, decay_steps=4)


def mixed_section(problem: Problem) -> Section:
    """An expert's rows, and what an environment replied, beside the policy's own samples."""
    rows = [_expert_row(problem), _schedule_row(), *_confidence_rows(problem), *_reply_rows(problem)]
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


def _reply_rows(problem: Problem) -> list[Row]:
    """Replies: after its first action the policy writes no more, an environment does, whose words are the reference's.

    The likelihood of replies follows its gradient in the states that were visited. That the first action leads to other
    states is not in it: as a gradient of the expected likelihood itself it would be biased.
    """
    tree = problem.tree
    reply_X = torch.arange(tree.states) >= tree.first_T[1]
    reply_N = reply_X[tree.state_N].double()

    def played(logp_XV: Tensor) -> Tensor:
        return torch.where(reply_X[:, None], problem.reference_XV, logp_XV)

    old_XV = played(problem.logp_XV.detach())
    probability_L, visits_X = truth.leaf_logp(tree, old_XV).exp(), truth.visits(tree, old_XV)

    def told(logp_XV: Tensor, at_X: Tensor) -> Tensor:
        return (at_X * reply_X * (problem.reference_XV.exp() * logp_XV).sum(1)).sum()

    held = problem.true_gradient(lambda logp_XV: told(logp_XV, visits_X))
    moving = problem.true_gradient(lambda logp_XV: told(logp_XV, truth.visits(tree, played(logp_XV))))

    def learned(weight_L: Tensor) -> Tensor:
        weight_N = tree.rows.spread(weight_L) * reply_N
        return -problem.expected_gradient(descent(supervised.nll, problem.old_N, weight_N))

    means: list[float | None] = []
    for size in SIZES:
        sets = multisets(probability_L.log(), size)
        if sets is None:
            means.append(None)
            continue
        replies_PG = tree.rows.sum(reply_N)[sets.leaf_PG]
        share_PG = (sets.probability_P / replies_PG.sum(1).clamp(min=1))[:, None].expand_as(replies_PG)
        weight_L = torch.zeros_like(probability_L).index_add(0, sets.leaf_PG.flatten(), share_PG.flatten())
        means.append(cosine(learned(weight_L), held))
    found = learned(probability_L)
    return [
        exact("likelihood of replies, summed", relative_error(found, held), "∇E[log π(reply)], states held fixed"),
        biased("likelihood of replies, summed, against ∇E[log π(reply)]", cosine(found, moving), "biased: states move"),
        biased("likelihood of replies, their mean in an update", means, "biased by their number"),
    ]
