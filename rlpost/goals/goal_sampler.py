"""Draws goals of a recipe, as tokens, for training value networks and for guided sampling."""

from __future__ import annotations

import random
from pathlib import Path

from rlpost.data.codec import Codec
from rlpost.errors import DataError
from rlpost.goals.goal_set import Goal, GoalSet
from rlpost.goals.params import Goals
from rlpost.goals.value_network import conditioned
from rlpost.stages.context import Context
from rlpost.types import Group


class GoalSampler:
    """The goals of a recipe."""

    def __init__(self, goals: Goals, codec: Codec, context: Context) -> None:
        """Read the goals.

        Raises:
            DataError: the file cannot be read, or is empty.
        """
        self._codec = codec
        self.column = goals.column
        """The column with each prompt's own goal, if the recipe has one."""
        where = f"stages.{context.name}.goals"
        texts = list(goals.texts) if goals.path is None else _lines(context.folder / goals.path, where)
        self.members = [codec.ids(text, where) for text in texts]
        self.all = GoalSet(self.members, where) if self.members else None
        """The set of all goals of the recipe; None if each prompt has its own."""

    def of(self, group: Group, condition: str | None, draw: random.Random) -> tuple[Goal, tuple[int, ...]]:
        """A goal for the group and the tokens that name it: a random one, or all if the network reads no goal.

        Raises:
            DataError: the row has no goal of its own.
        """
        if self.column is not None:
            text = group.example.get(self.column)
            if not isinstance(text, str) or not text:
                raise DataError(f"goals.column: a row has no text in {self.column!r}; give each row its goal")
            ids = self._codec.ids(text, self.column)
            return GoalSet([ids]), ids
        assert self.all is not None, "validated: goals, or hindsight for every prompt"
        if condition is None:
            return self.all, ()
        ids = draw.choice(self.members)
        return GoalSet([ids]), ids

    def max_length(self, condition: str | None, other: int) -> int:
        """Most tokens that naming a goal takes, if goals of other sources have at most `other`."""
        goal = [0] * max([other, *map(len, self.members)])
        return len(conditioned(condition, goal, (), self._codec))


def _lines(file: Path, where: str) -> list[str]:
    if not file.is_file():
        raise DataError(f"{where}.path: {file} does not exist; give a text file with one ending a line")
    return [line for line in file.read_text("utf-8").splitlines() if line]
