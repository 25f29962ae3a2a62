"""A tree, a policy on it, rewards and a reference, for the claims.

Axes: X states, V tokens, L leaves, N actions of all leaves, F parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rlpost.oracle import truth
from rlpost.oracle.multisets import Multisets, multisets
from rlpost.oracle.policies import Table, TreePolicy
from rlpost.oracle.tree import Tree

SIZES = (2, 3)
"""Completions a group."""


@dataclass(frozen=True)
class Problem:
    """A learning problem on a tree."""

    tree: Tree
    policy: TreePolicy
    reward_L: Tensor
    reference_XV: Tensor
    """Log-probabilities of the reference policy."""

    @cached_property
    def logp_XV(self) -> Tensor:
        """[X, V] of the policy, with gradient: for the truth."""
        return self.policy.logp_XV()

    @cached_property
    def logp_N(self) -> Tensor:
        """[N] of every leaf's actions, with gradient: for the estimators."""
        return self.policy.logp_N()

    @cached_property
    def old_N(self) -> Tensor:
        """[N] of the policy that samples: the same, as numbers."""
        return self.logp_N.detach()

    @cached_property
    def reference_N(self) -> Tensor:
        """[N] of the reference."""
        return self.at_actions(self.reference_XV)

    @cached_property
    def prefix_N(self) -> Tensor:
        """[N] a number for the prefix that ends in each action, the same in every leaf that begins with it."""
        return self.tree.state_N * self.tree.vocabulary + self.tree.token_N

    @cached_property
    def probability_L(self) -> Tensor:
        """[L] of each completion under the policy."""
        return truth.leaf_logp(self.tree, self.logp_XV.detach()).exp()

    @cached_property
    def value_X(self) -> Tensor:
        """[X] true expected reward from each state on."""
        return truth.values(self.tree, self.logp_XV.detach(), self.reward_L)

    @cached_property
    def reward_gradient(self) -> Tensor:
        """[F] true gradient of the expected reward."""
        return self.true_gradient(lambda logp_XV: truth.values(self.tree, logp_XV, self.reward_L)[0])

    @cached_property
    def kl_gradient(self) -> Tensor:
        """[F] true gradient of KL(policy || reference)."""
        return self.true_gradient(lambda logp_XV: truth.kl(self.tree, logp_XV, self.reference_XV))

    @cached_property
    def entropy_gradient(self) -> Tensor:
        """[F] true gradient of the entropy of completions."""
        return self.true_gradient(lambda logp_XV: truth.entropy(self.tree, logp_XV))

    def true_gradient(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """[F] derivative of an exact number, made from the log-probabilities of every state."""
        return truth.gradient(of(self.policy.logp_XV()), self.policy.parameters)

    def expected_gradient(self, coefficient_N: Tensor) -> Tensor:
        """[F] Σ_n coefficient_n·∇logp_n, on the path that stages train on."""
        parameters = self.policy.parameters
        pieces = torch.autograd.grad(self.logp_N, parameters, coefficient_N, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(pieces, parameters, strict=True)]
        return torch.cat([g.flatten() for g in filled])

    def at_actions(self, table_XV: Tensor) -> Tensor:
        """[N] the entries of a table at every leaf's actions."""
        return table_XV[self.tree.state_N, self.tree.token_N]

    def groups(self, size: int) -> Multisets | None:
        """All groups of `size` completions, or None where they are too many."""
        return multisets(self.probability_L.log(), size)

    def rewarded(self, reward_L: Tensor) -> Problem:
        """The same with other rewards."""
        return replace(self, reward_L=reward_L)

    def binary(self) -> Problem:
        """The same with reward 1 for completions better than the expected reward, else 0."""
        return self.rewarded((self.reward_L > self.value_X[0]).double())


def table_problem(tree: Tree, seed: int) -> Problem:
    """Random logits for policy and reference, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    policy_XV, reference_XV = (
        torch.randn(tree.states, tree.vocabulary, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return Problem(tree, Table(tree, policy_XV), graded(tree, generator), reference_XV.log_softmax(1))


def graded(tree: Tree, generator: torch.Generator) -> Tensor:
    """[L] rewards that grow with the length, with a part of their own: at least three levels.

    Both matter: with two levels, or with lengths that have nothing to do with the reward, some biases vanish.
    """
    own_L = torch.arange(tree.leaves)[torch.randperm(tree.leaves, generator=generator)] % 3
    return (tree.length_L.double() + 0.4 * own_L) / (tree.depth + 2)


def relative_error(found: Tensor, true: Tensor, scale: float = 1.0) -> float:
    """‖found − scale·true‖ / (scale·‖true‖)."""
    return float((found - scale * true).norm() / (scale * true).norm())


def cosine(found: Tensor, true: Tensor) -> float:
    """Of the angle between two gradients."""
    return float(found @ true / (found.norm() * true.norm()))
