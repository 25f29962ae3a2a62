"""Enumerates the likely completions of one prompt under a policy.

Axes: X states, V tokens, x states of one length.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.errors import RecipeError
from rlpost.goals.goal_set import Goal
from rlpost.oracle.tree import MOST_LEAVES
from rlpost.policy.policy import Policy
from rlpost.policy.score import passes
from rlpost.types import Completion, Group, completions

LEAST = 1e-5
"""States with a smaller probability are not followed."""


@dataclass(frozen=True)
class Level:
    """The followed states of one length."""

    states: tuple[tuple[int, ...], ...]
    """The tokens of each."""
    reach_x: Tensor
    """[x] probability that a completion passes through it."""
    logp_xV: Tensor
    """[x, V] log-probabilities of the next token, in float64."""
    child_xV: Tensor
    """[x, V] index of the next state in the next level; −1 for ends and states that are not followed."""


@dataclass(frozen=True)
class Unfolded:
    """A prompt's completions."""

    prompt: tuple[int, ...]
    levels: tuple[Level, ...]
    end_ids: frozenset[int]
    left_out: float
    """Probability of completions that were not followed: the largest error of a value at the root."""

    @property
    def states(self) -> list[tuple[int, ...]]:
        """All states, from short to long."""
        return [state for level in self.levels for state in level.states]

    @property
    def reach_X(self) -> Tensor:
        """[X] probability that a completion passes through each state."""
        return torch.cat([level.reach_x for level in self.levels])

    def values(self, goal: Goal, *, truncated_counts: bool = False) -> Tensor:
        """[X] the probability that a completion from each state ends in the goal: V(x) = Σ_v π(v|x)·V(x·v)."""
        found: list[Tensor] = []
        for depth in reversed(range(len(self.levels))):
            level, last = self.levels[depth], depth == len(self.levels) - 1
            after_xV = torch.zeros_like(level.logp_xV)
            for end in self.end_ids:
                after_xV[:, end] = torch.tensor([float(goal.reached(state)) for state in level.states])
            if not last:
                follows = level.child_xV >= 0
                after_xV[follows] = found[-1][level.child_xV[follows]]
            elif truncated_counts:
                for x, state in enumerate(level.states):
                    for token in set(range(after_xV.shape[1])) - self.end_ids:
                        after_xV[x, token] = float(goal.reached((*state, token)))
            found.append((level.logp_xV.exp() * after_xV).sum(1))
        return torch.cat(found[::-1])


def unfold(policy: Policy, prompt: tuple[int, ...], depth: int, *, least: float = LEAST) -> Unfolded:
    """Follow all completions of at most `depth` tokens through states of probability at least `least`.

    Raises:
        RecipeError: there are more than MOST_LEAVES continuations.
    """
    ends = frozenset(policy.end_ids)
    levels: list[Level] = []
    states: list[tuple[int, ...]] = [()]
    reach_x = torch.ones(1, dtype=torch.float64)
    evaluated, left_out = 0, 0.0
    for length in range(depth):
        evaluated += len(states) * policy.vocabulary
        if evaluated > MOST_LEAVES:
            raise RecipeError(
                f"the completions have more than {MOST_LEAVES} likely continuations; "
                "enumerate fewer tokens, or leave out more with --least"
            )
        logp_xV = next_tokens(policy, prompt, states)
        joint_xV = reach_x[:, None] * logp_xV.exp()
        goes_on_V = torch.tensor([token not in ends for token in range(policy.vocabulary)])
        followed = (joint_xV >= least) & goes_on_V & (length < depth - 1)
        child_xV = torch.full(logp_xV.shape, -1)
        child_xV[followed] = torch.arange(int(followed.sum()))
        levels.append(Level(tuple(states), reach_x, logp_xV, child_xV))
        if length < depth - 1:
            left_out += float(joint_xV[~followed & goes_on_V].sum())
        states = [(*states[x], v) for x, v in followed.nonzero().tolist()]
        reach_x = joint_xV[followed]
        if not states:
            break
    return Unfolded(prompt, tuple(levels), ends, left_out)


@torch.no_grad()
def next_tokens(policy: Policy, prompt: tuple[int, ...], states: Collection[tuple[int, ...]]) -> Tensor:
    """[x, V] log-probabilities of the next token in each state, in float64."""
    pieces = []
    for some in passes([ahead_of(prompt, state) for state in states], 16384):
        batch = policy.batch([Group(prompt, completions(some))])
        # Normalised again in float64: float32 probabilities do not sum to 1, and these are summed over whole trees.
        pieces.append(policy.distributions(batch)(slice(None)).cpu().double().log_softmax(-1))
    return torch.cat(pieces)


def ahead_of(prompt: tuple[int, ...], state: tuple[int, ...]) -> Group:
    """A group with one action in `state`; the action itself does not matter."""
    return Group(prompt, (Completion((*state, 0), (False,) * len(state) + (True,)),))
