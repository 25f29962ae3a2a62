"""Sets of final token sequences: what a completion is to end in, or never to end in."""

from rlpost.goals.goal_set import Goal, GoalSet, Predicate, ends_in
from rlpost.goals.trie import Trie

__all__ = ["Goal", "GoalSet", "Predicate", "Trie", "ends_in"]
