"""Checks, while a stage's rows are read, that its rewards can read their reference answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlpost.data.files import Chunk
from rlpost.data.formats import DataRole
from rlpost.rewards.math import References
from rlpost.rewards.params import reward_leaves


@dataclass(frozen=True)
class ReadableReferences:
    """Checks that every row has a readable reference answer in each of `columns`."""

    columns: tuple[str, ...]
    recorded: bool
    """Rows are recorded rollouts; the data row of each is its `example`."""

    @property
    def identity(self) -> Any:
        """What is checked, as a key of cached rows."""
        return [self.columns, self.recorded]

    def __call__(self, chunks: Iterator[Chunk], location: Callable[[int], str]) -> Iterator[Chunk]:
        """Pass the rows through; raises DataError after the last one if some answers cannot be read."""
        references = [References(column) for column in self.columns]
        for chunk in chunks:
            examples = [row.get("example") or {} for row in chunk.rows] if self.recorded else chunk.rows
            for column in references:
                column.read(examples, [location(n) for n in chunk.numbers])
            yield chunk
        for column in references:
            column.refuse()


def readable_references(stage: Any, where: str, need: DataRole) -> ReadableReferences | None:
    """The check for the rewards at key path `where`, of a stage or the evaluation; None if they read no answer."""
    leaves = reward_leaves(getattr(stage, "rewards", []), where)
    columns = dict.fromkeys(leaf.args.get("column", "answer") for leaf, _ in leaves if leaf.fn == "math_answer")
    return ReadableReferences(tuple(columns), need is DataRole.recorded) if columns else None
