"""Reference answers that a stage's rewards will read, looked at while its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlpost.data.files import Chunk
from rlpost.data.formats import Need
from rlpost.rewards.math import References
from rlpost.rewards.params import reward_leaves


@dataclass(frozen=True)
class ReadableReferences:
    """Every row has a reference answer that can be read, in each of some columns."""

    columns: tuple[str, ...]
    recorded: bool
    """Rows are recorded rollouts, and the row they are about stands in `example`."""

    @property
    def identity(self) -> Any:
        """What is looked at."""
        return [self.columns, self.recorded]

    def __call__(self, chunks: Iterator[Chunk], location: Callable[[int], str]) -> Iterator[Chunk]:
        """Hand the rows on; raises DataError at their end, about all that cannot be read."""
        references = [References(column) for column in self.columns]
        for chunk in chunks:
            examples = [row.get("example") or {} for row in chunk.rows] if self.recorded else chunk.rows
            for column in references:
                column.read(examples, [location(n) for n in chunk.numbers])
            yield chunk
        for column in references:
            column.refuse()


def readable_references(stage: Any, where: str, need: Need) -> ReadableReferences | None:
    """What the rewards of a stage, or of the evaluation, at key path `where` need of its rows."""
    leaves = reward_leaves(getattr(stage, "rewards", []), where)
    columns = dict.fromkeys(leaf.args.get("column", "answer") for leaf, _ in leaves if leaf.fn == "math_answer")
    return ReadableReferences(tuple(columns), need is Need.recorded) if columns else None
