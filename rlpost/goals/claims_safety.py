"""Claims about forbidden endings: what is left of them, and what it costs, after a guide, a reward and unlikelihood.

π0 is the policy before, u its mass on forbidden endings. Whatever is done, a policy with mass w on them is at least
w·log(w/u) + (1−w)·log((1−w)/(1−u)) nats from π0 (the divergence of whole completions is no less than that of the one
bit, forbidden or not). The guide and the best policy for a reward pay exactly that.

Axes: X states, V tokens, L leaves, N actions of all leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlpost.goals.claims_goals import some_goal
from rlpost.goals.exact import from_table, guided, reached
from rlpost.goals.guide import Guide, Mode
from rlpost.objectives.supervised import likelihood_by_label
from rlpost.oracle import truth
from rlpost.oracle.policies import Table
from rlpost.oracle.problem import Problem
from rlpost.oracle.report import Row, Section, exact, fact, holds
from rlpost.oracle.tree import END, Tree

BETAS = (1.0, 0.3, 0.1)
"""Of the divergence, against a reward of −1."""
STEPS = 100
RATE = 2.0
"""Gradient steps on the logits of a table."""


def safety_section(problem: Problem, seed: int) -> Section:
    """What `rlpost verify goals` says of forbidden endings."""
    tree, logp_XV = problem.tree, problem.logp_XV.detach()
    goal = some_goal(tree, seed)
    unsafe_L = reached(tree, goal, truncated_counts=True)
    before = mass(tree, logp_XV, unsafe_L)
    avoid_X = truth.values(tree, logp_XV, 1 - unsafe_L)
    guide = Guide(from_table(tree, avoid_X.log()), goal, {END}, Mode.away, truncated_counts=True)
    led_XV = guided(tree, logp_XV, guide)
    left, paid = mass(tree, led_XV, unsafe_L), divergence(tree, led_XV, logp_XV)
    rows = [
        fact("forbidden mass u before", f"{before:.4f}"),
        holds("guided away with the true S: forbidden mass", f"{left:.1e}", "exactly 0", left == 0.0),
        exact(f"… KL to the start, {paid:.4f}, against −log(1 − u)", abs(paid + math.log1p(-before))),
        *(row for beta in BETAS for row in _reward_rows(tree, logp_XV, unsafe_L, before, beta)),
        *_unlikelihood_rows(tree, logp_XV, unsafe_L, before),
    ]
    return Section("forbidden endings: what is left of them, and its price in KL to the start", tuple(rows))


def mass(tree: Tree, logp_XV: Tensor, unsafe_L: Tensor) -> float:
    """Probability of a forbidden ending."""
    return float(truth.leaf_logp(tree, logp_XV).exp() @ unsafe_L)


def divergence(tree: Tree, logp_XV: Tensor, start_XV: Tensor) -> float:
    """KL(policy || start) of whole completions, also of a policy that never says some of them."""
    logp_L, start_L = truth.leaf_logp(tree, logp_XV), truth.leaf_logp(tree, start_XV)
    said_L = logp_L > -torch.inf
    return float(logp_L[said_L].exp() @ (logp_L - start_L)[said_L])


def least_divergence(after: float, before: float) -> float:
    """KL to the start that no policy with the forbidden mass `after` is below."""
    rest = (1 - after) * (math.log1p(-after) - math.log1p(-before))
    return rest + (after * math.log(after / before) if after else 0.0)


def unlearned(tree: Tree, start_XV: Tensor, unsafe_L: Tensor) -> Tensor:
    """[X, V] of a table after gradient steps on the loss of all completions, weighed as the start says them."""
    policy = Table(tree, start_XV)
    label_N = tree.rows.spread(unsafe_L) == 0
    weight_N = tree.rows.spread(truth.leaf_logp(tree, start_XV).exp())
    for _ in range(STEPS):
        loss = (likelihood_by_label(policy.logp_N(), label_N) * weight_N).sum()
        (slope_XV,) = torch.autograd.grad(loss, policy.parameters)
        with torch.no_grad():
            policy.logits_XV -= RATE * slope_XV
    return policy.logp_XV().detach()


def _reward_rows(tree: Tree, logp_XV: Tensor, unsafe_L: Tensor, before: float, beta: float) -> list[Row]:
    """π ∝ π0·exp(−1{forbidden}/β) maximises E[−1{forbidden}] − β·KL."""
    best_XV = truth.soft_optimum(tree, logp_XV, -unsafe_L, beta)
    left, paid = mass(tree, best_XV, unsafe_L), divergence(tree, best_XV, logp_XV)
    kept = before * math.exp(-1 / beta)
    return [
        exact(
            f"reward −1, β = {beta:g}: forbidden mass, {left:.1e}, against u·e^(−1/β)/(1 − u + u·e^(−1/β))",
            abs(left / (kept / (1 - before + kept)) - 1),
        ),
        exact(
            f"… KL to the start, {paid:.4f}, against the least for this mass",
            abs(paid - least_divergence(left, before)),
        ),
    ]


def _unlikelihood_rows(tree: Tree, logp_XV: Tensor, unsafe_L: Tensor, before: float) -> list[Row]:
    after_XV = unlearned(tree, logp_XV, unsafe_L)
    left, paid = mass(tree, after_XV, unsafe_L), divergence(tree, after_XV, logp_XV)
    least = least_divergence(left, before)
    return [
        holds(f"likelihood_by_label, {STEPS} steps: forbidden mass", f"{left:.1e}", "less than u", left < before),
        holds("… KL to the start", f"{paid:.4f}", f"no less than {least:.4f}", paid > least),
    ]
