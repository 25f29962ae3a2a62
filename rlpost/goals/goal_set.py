"""Goals: where completions are to end, as a set of final token sequences or as a predicate.

Whether a text ends in one of the set's members is found by walking back from its end, through a trie of the members
reversed; how far along it is, by walking on from its last tokens through a trie of the members. Neither depends on
how many members there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from rlpost.errors import DataError
from rlpost.goals.trie import Trie
from rlpost.types import Completion


class Goal(Protocol):
    """Something that a finished sequence of tokens reaches or not."""

    def reached(self, ids: Sequence[int]) -> bool:
        """True if a completion of these tokens (without its end token) ends in the goal."""
        ...


class GoalSet:
    """A set of final token sequences."""

    def __init__(self, members: Sequence[Sequence[int]], where: str = "the goal set") -> None:
        """Keep the members; `where` is said in errors.

        Raises:
            DataError: there are none, or one is empty (everything would end in it).
        """
        if not members:
            raise DataError(f"{where}: no members; give at least one sequence of tokens")
        empty = next((i for i, m in enumerate(members) if not m), None)
        if empty is not None:
            raise DataError(f"{where}: member {empty + 1} is empty, and every text ends in nothing; remove it")
        self._backward = Trie([m[::-1] for m in members])
        self._forward = Trie(members)
        self.longest = self._forward.depth
        """Tokens of the longest member."""

    def __len__(self) -> int:
        return int(self._forward.ends_X.sum())

    @property
    def bytes(self) -> int:
        """Memory of both tries."""
        return self._backward.bytes + self._forward.bytes

    def reached(self, ids: Sequence[int]) -> bool:
        """True if the last tokens are a member."""
        return self._backward.matches(islice(reversed(ids), self.longest))

    def progress(self, ids: Sequence[int]) -> int:
        """How far along a prefix is: the most of its last tokens with which some member begins."""
        for length in range(min(len(ids), self.longest), 0, -1):
            if self._forward.walks(ids[len(ids) - length :]):
                return length
        return 0


def ends_in(goal: Goal, completion: Completion, end_ids: Sequence[int], *, truncated_counts: bool = False) -> bool:
    """True if the completion ends in the goal: the last tokens before its end token, a cut-off one only if told so."""
    if completion.finish == "length" and not truncated_counts:
        return False
    ids = tuple(completion.ids.tolist())
    return goal.reached(ids[:-1] if ids and ids[-1] in end_ids else ids)
