"""Exact quantities of a tree, summed over all of it; every function is differentiable.

Axes: X states, V tokens, L leaves, F parameters. `logp_XV` holds a policy's log-probabilities in every state. Nothing
here samples or uses the score function, which estimators are based on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlpost.oracle.tree import Tree


def backwards(tree: Tree, leaf_L: Tensor, step: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """[X] a number of every state, computed from those its actions lead to: `step(level, after_xV) -> [x]`."""
    found: list[Tensor] = []
    for level in tree.levels():
        found.append(step(level, tree.after(level, leaf_L, found[-1] if found else None)))
    return torch.cat(found[::-1])


def leaf_logp(tree: Tree, logp_XV: Tensor) -> Tensor:
    """[L] log-probability of every completion."""
    return tree.rows.sum(logp_XV[tree.state_N, tree.token_N])


def values(tree: Tree, logp_XV: Tensor, reward_L: Tensor) -> Tensor:
    """[X] expected reward from every state: V(x) = Σ_a π(a|x)·(V of the next state, or reward of the leaf)."""
    return backwards(tree, reward_L, lambda level, after: (logp_XV[level].exp() * after).sum(1))


def visits(tree: Tree, logp_XV: Tensor) -> Tensor:
    """[X] probability that a completion passes through each state."""
    found = [logp_XV.new_ones(1)]
    for t in range(tree.depth - 1):
        level = slice(tree.first_T[t], tree.first_T[t + 1])
        found.append((found[-1][:, None] * logp_XV[level, 1:].exp()).flatten())
    return torch.cat(found)


def kl(tree: Tree, logp_XV: Tensor, reference_XV: Tensor) -> Tensor:
    """KL(policy || reference) of whole completions, by the chain rule: Σ_x P(x)·KL in state x."""
    return (visits(tree, logp_XV) * (logp_XV.exp() * (logp_XV - reference_XV)).sum(1)).sum()


def entropy(tree: Tree, logp_XV: Tensor) -> Tensor:
    """Entropy of whole completions in nats."""
    return -kl(tree, logp_XV, torch.zeros_like(logp_XV))


def soft_values(tree: Tree, reference_XV: Tensor, reward_L: Tensor, beta: float) -> Tensor:
    """[X] V_soft(x) = β·log Σ_a ref(a|x)·exp(V_soft or reward of what follows / β)."""
    return backwards(tree, reward_L, lambda level, after: beta * (reference_XV[level] + after / beta).logsumexp(1))


def soft_optimum(tree: Tree, reference_XV: Tensor, reward_L: Tensor, beta: float) -> Tensor:
    """[X, V] log-probabilities of the policy that maximises E[reward] − β·KL(policy || reference)."""
    soft_X = soft_values(tree, reference_XV, reward_L, beta)
    return reference_XV + (action_values(tree, soft_X, reward_L) - soft_X[:, None]) / beta


def conditional(tree: Tree, probability_L: Tensor) -> Tensor:
    """[X, V] log-probabilities of the policy whose completions have the given probabilities, all of them positive."""
    mass_X = backwards(tree, probability_L, lambda _, after: after.sum(1))
    return (action_values(tree, mass_X, probability_L) / mass_X[:, None]).log()


def action_values(tree: Tree, value_X: Tensor, reward_L: Tensor) -> Tensor:
    """[X, V] the value of the next state, or the reward of the leaf, after each action."""
    deeper: Tensor | None = None
    found: list[Tensor] = []
    for level in tree.levels():
        found.append(tree.after(level, reward_L, deeper))
        deeper = value_X[level]
    return torch.cat(found[::-1])


def gradient(of: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """[F] the derivative of a number by the parameters, as one vector."""
    pieces = torch.autograd.grad(of, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(pieces, parameters, strict=True)]
    )
