"""Every completion over a small vocabulary, enumerated.

Axes: X states (prefixes that go on), V tokens, L leaves (whole completions), N actions of all leaves, leaf after leaf.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlpost.errors import RecipeError
from rlpost.objectives.ragged import Ragged

END = 0
"""The token that ends a completion."""
MOST_LEAVES = 100_000
MOST_ACTIONS = 2_000_000
DEEPEST = 25
"""Most tokens of a completion. Only a vocabulary of 2 could go deeper, without testing anything new."""


class Tree:
    """All completions of at most `depth` tokens over `vocabulary` tokens, one of which ends.

    Example: vocabulary 3, depth 2 has the states (), (1), (2) and the leaves 0, 10, 11, 12, 20, 21, 22: token 0
    ends a completion, and one of full length is cut off. States and leaves are numbered from short to long.
    """

    def __init__(self, vocabulary: int, depth: int) -> None:
        """Enumerate.

        Raises:
            RecipeError: the tree is too small to test anything, or too large to enumerate.
        """
        location = f"vocabulary {vocabulary}, depth {depth}"
        if vocabulary < 2 or depth < 2:
            raise RecipeError(f"{location}: a tree needs at least vocabulary 2 (an end token and another) and depth 2")
        if depth > DEEPEST:
            raise RecipeError(f"{location}: a depth of more than {DEEPEST}; take a smaller one")
        go_on = vocabulary - 1
        leaves, actions, width = 0, 0, 1
        for t in range(depth):
            here = width * (vocabulary if t == depth - 1 else 1)
            leaves, actions, width = leaves + here, actions + here * (t + 1), width * go_on
            if leaves > MOST_LEAVES or actions > MOST_ACTIONS:
                limit = f"more than {MOST_LEAVES} completions or {MOST_ACTIONS} actions"
                raise RecipeError(f"{location}: {limit}; take a smaller vocabulary or depth")
        self.vocabulary, self.depth = vocabulary, depth
        self.first_T: list[int] = [sum(go_on**k for k in range(t)) for t in range(depth + 1)]
        """The number of the first state of each length, and of all states."""
        pieces = list(self._leaves_by_length())
        self.state_N = torch.cat([state.flatten() for state, _ in pieces])
        """[N] the state in which each action is taken."""
        self.token_N = torch.cat([token.flatten() for _, token in pieces])
        self.rows = Ragged(torch.cat([torch.full((len(token),), token.shape[1]) for _, token in pieces]))
        """Which action belongs to which leaf."""

    @property
    def states(self) -> int:
        """X."""
        return self.first_T[-1]

    @property
    def leaves(self) -> int:
        """L."""
        return self.rows.completions

    @property
    def length_L(self) -> Tensor:
        """[L] actions of each leaf."""
        return self.rows.lengths_S

    @property
    def cut_L(self) -> Tensor:
        """[L] True where a completion was cut off before it ended."""
        return self.token_N[self.rows.last] != END

    def leaf_by(self, token_X: Tensor) -> int:
        """The leaf that is reached by taking the given token in every state."""
        follows_N = (self.token_N == token_X[self.state_N]).double()
        return int((self.rows.mean(follows_N) == 1).nonzero()[0])

    def prefixes(self, length: int) -> Tensor:
        """[x, length] the tokens of every state of that length."""
        return self._path(torch.arange((self.vocabulary - 1) ** length), length)[1]

    def levels(self) -> Iterator[slice]:
        """The states of each length, from the longest to the root."""
        for t in reversed(range(self.depth)):
            yield slice(self.first_T[t], self.first_T[t + 1])

    def after(self, level: slice, ended_L: Tensor, going_on: Tensor | None) -> Tensor:
        """[x, V] the number of the state or leaf that each action leads to, for the states of one level.

        Args:
            level: as `levels` gives it.
            ended_L: the number of each leaf.
            going_on: the numbers of the states one level deeper; None at the deepest, where nothing goes on.
        """
        width = level.stop - level.start
        if going_on is None:
            return ended_L[level.start :].view(width, self.vocabulary)
        # Above the deepest level, each state has one leaf (it ends), in the order of the states.
        return torch.cat([ended_L[level, None], going_on.view(width, self.vocabulary - 1)], 1)

    def _leaves_by_length(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(states, tokens), both [l, length], of the leaves of each length."""
        for t in range(self.depth):
            here = torch.arange((self.vocabulary - 1) ** t)
            states, tokens = self._path(here, t)
            last = torch.arange(self.vocabulary) if t == self.depth - 1 else torch.tensor([END])
            state = torch.cat([states, self.first_T[t] + here[:, None]], 1).repeat_interleave(len(last), 0)
            before = tokens.repeat_interleave(len(last), 0)
            yield state, torch.cat([before, last.repeat(len(here))[:, None]], 1)

    def _path(self, here: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Both [x, length]: the states that lead to the states numbered `here` within their level, and the tokens."""
        go_on = self.vocabulary - 1
        nothing = here.new_zeros(len(here), 0)
        above = [here // go_on ** (length - k) for k in range(length + 1)]
        states = [self.first_T[k] + above[k] for k in range(length)]
        tokens = [above[k + 1] % go_on + 1 for k in range(length)]
        return (torch.stack(states, 1), torch.stack(tokens, 1)) if length else (nothing, nothing)
