"""Goals of completions: a set of final token sequences, or a predicate.

Whether a text ends in a member is found by walking back from its end through a trie of the reversed members; how much
of a member it has written, by walking from its last tokens through a trie of the members. The cost of either does not
depend on the number of members.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from rlpost.errors import DataError
from rlpost.goals.trie import Trie
from rlpost.types import Completion


class Goal(Protocol):
    """A predicate of finished completions."""

    def reached(self, ids: Sequence[int]) -> bool:
        """True if a completion of these tokens (without its end token) ends in the goal."""
        ...


class GoalSet:
    """A set of final token sequences."""

    def __init__(self, members: Sequence[Sequence[int]], where: str = "the goal set") -> None:
        """Build the tries; `where` is for messages.

        Raises:
            DataError: there are none, or one is empty (everything would end in it).
        """
        if not members:
            raise DataError(f"{where}: no members; give at least one sequence of tokens")
        empty = next((i for i, m in enumerate(members) if not m), None)
        if empty is not None:
            raise DataError(f"{where}: member {empty + 1} is empty, and every text ends in it; remove it")
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
        """How much of a member is written: the most of the last tokens that some member begins with."""
        for length in range(min(len(ids), self.longest), 0, -1):
            if self._forward.walks(ids[len(ids) - length :]):
                return length
        return 0


def ends_in(goal: Goal, completion: Completion, end_ids: Sequence[int], *, truncated_counts: bool = False) -> bool:
    """True if the completion reaches the goal, without its end token; a truncated one only with `truncated_counts`."""
    if completion.finish == "length" and not truncated_counts:
        return False
    ids = tuple(completion.ids.tolist())
    return goal.reached(ids[:-1] if ids and ids[-1] in end_ids else ids)
