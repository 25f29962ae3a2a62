"""A trained policy as a table on the tree of all its completions of a prompt, alone or guided by a value network.

A tree's token 0 ends a completion; `Tokens` maps the tree's tokens to the model's.

Axes: X states, V tokens, L leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.errors import EngineError
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.guide import Position
from rlpost.goals.unfold import next_tokens
from rlpost.goals.value_network import ValueNetwork
from rlpost.oracle import truth
from rlpost.oracle.tree import Tree
from rlpost.policy.policy import Policy


@dataclass(frozen=True)
class Tokens:
    """The model's tokens in the tree's order: (2, 0, 1, 3) if token 2 ends a completion."""

    of_V: tuple[int, ...]

    @classmethod
    def made_for(cls, policy: Policy) -> Tokens:
        """The end token first, all others in their order."""
        (end,) = policy.end_ids
        return cls((end, *(v for v in range(policy.vocabulary) if v != end)))

    def real(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The model's tokens of the tree's `ids`."""
        return tuple(self.of_V[v] for v in ids)

    def goal(self, members: Sequence[Sequence[int]]) -> GoalSet:
        """A goal on the tree, from members in the model's tokens."""
        number = {real: v for v, real in enumerate(self.of_V)}
        return GoalSet([[number[i] for i in member] for member in members])


def policy_table(policy: Policy, prompt: Sequence[int], tree: Tree, tokens: Tokens) -> Tensor:
    """[X, V] log-probabilities in every state after `prompt`, in float64, by the policy's own forward pass."""
    states = [tokens.real(ids) for length in range(tree.depth) for ids in tree.prefixes(length).tolist()]
    return next_tokens(policy, tuple(prompt), states)[:, list(tokens.of_V)]


def network_table(network: ValueNetwork, prompt: Sequence[int], tree: Tree, tokens: Tokens) -> Tensor:
    """[X] log of the network's value in every state after `prompt`; 0 for the prompt itself, which is not needed."""
    rows = [
        Position(tuple(prompt), tokens.real(ids), last=False)
        for length in range(tree.depth - 1)
        for ids in tree.prefixes(length).tolist()
    ]
    candidate_BK = torch.tensor(tokens.of_V[1:]).expand(len(rows), -1)
    return torch.cat([torch.zeros(1, dtype=torch.float64), network.ahead(rows, candidate_BK).flatten()])


def guided_away(tree: Tree, logp_XV: Tensor, log_X: Tensor, unsafe_L: Tensor) -> Tensor:
    """[X, V] log-probabilities of the policy guided away from forbidden leaves by log S, with all tokens weighed.

    Raises:
        EngineError: in some state every token ends in a forbidden leaf.
    """
    weight_XV = truth.action_values(tree, log_X, (1 - unsafe_L).log())
    if (weight_XV == -torch.inf).all(1).any():
        raise EngineError("in some state every token leads to a forbidden ending; forbid less")
    return (logp_XV + weight_XV).log_softmax(1)
