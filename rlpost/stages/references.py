"""Checks, while a stage's rows are read, that its rewards can read what they need of them: answers, tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlpost.data.files import Chunk
from rlpost.data.formats import DataRole
from rlpost.rewards.code_tests import read_tests
from rlpost.rewards.math import References, read_reference
from rlpost.rewards.params import reward_leaves
from rlpost.sandbox.levels import checked

_READ: dict[str, tuple[str, Callable[[Mapping[str, Any], str], object]]] = {
    "math_answer": ("answer", read_reference),
    "code": ("tests", read_tests),
}
"""Reward function -> (the column it reads by default, what reads it)."""


@dataclass(frozen=True)
class ReadableReferences:
    """Checks that every row has what each of `columns`, of a reward function, should hold."""

    columns: tuple[tuple[str, str], ...]
    """(reward function, column)."""
    recorded: bool
    """Rows are recorded rollouts; the data row of each is its `example`."""

    @property
    def identity(self) -> Any:
        """What is checked, as a key of cached rows."""
        return [self.columns, self.recorded]

    def __call__(self, chunks: Iterator[Chunk], location: Callable[[int], str]) -> Iterator[Chunk]:
        """Pass the rows through; raises DataError after the last one if some cannot be read."""
        references = [References(column, _READ[fn][1]) for fn, column in self.columns]
        for chunk in chunks:
            examples = [row.get("example") or {} for row in chunk.rows] if self.recorded else chunk.rows
            for column in references:
                column.read(examples, [location(n) for n in chunk.numbers])
            yield chunk
        for column in references:
            column.refuse()


def readable_references(stage: Any, where: str, need: DataRole) -> ReadableReferences | None:
    """The check for the rewards at key path `where`, of a stage or the evaluation; None if they read no column.

    Raises:
        RecipeError: a reward runs programs, and no sandbox holds here as it asks for.
    """
    columns: dict[tuple[str, str], None] = {}
    for leaf, place in reward_leaves(getattr(stage, "rewards", []), where):
        if leaf.fn in _READ:
            columns[leaf.fn, leaf.args.get("column", _READ[leaf.fn][0])] = None
        if leaf.fn == "code":
            checked(leaf.args, f"{place}.args")
    return ReadableReferences(tuple(columns), need is DataRole.recorded) if columns else None
