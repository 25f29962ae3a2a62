"""Checks, while a stage's rows are read, that what reads their columns can: rewards, an advantage, a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlpost.data.files import Chunk
from rlpost.data.formats import DataRole
from rlpost.data.part import Check
from rlpost.data.privileged import KEY, FillsTemplate
from rlpost.data.row_values import READS
from rlpost.recipe.grouped import ADVANTAGE
from rlpost.rewards.code_tests import read_tests
from rlpost.rewards.math import References, read_reference
from rlpost.rewards.params import reward_leaves
from rlpost.sandbox.levels import checked
from rlpost.usercode.signatures import info_of

_READ: dict[str, tuple[str, Callable[[Mapping[str, Any], str], object]]] = {
    "math_answer": ("answer", read_reference),
    "code": ("tests", read_tests),
}
"""Reward function -> (the column it reads by default, what reads it)."""


@dataclass(frozen=True)
class ReadableReferences:
    """Checks that every row has what each of `columns` should hold."""

    columns: tuple[tuple[str, str], ...]
    """(reward function or an advantage's argument, column)."""
    recorded: bool
    """Rows are recorded rollouts; the data row of each is its `example`."""

    @property
    def identity(self) -> Any:
        """What is checked, as a key of cached rows."""
        return [self.columns, self.recorded]

    def __call__(self, chunks: Iterator[Chunk], location: Callable[[int], str]) -> Iterator[Chunk]:
        """Pass the rows through; raises DataError after the last one if some cannot be read."""
        references = [References(column, _reader(what)) for what, column in self.columns]
        for chunk in chunks:
            examples = [row.get("example") or {} for row in chunk.rows] if self.recorded else chunk.rows
            for column in references:
                column.read(examples, [location(n) for n in chunk.numbers])
            yield chunk
        for column in references:
            column.refuse()


@dataclass(frozen=True)
class Every:
    """Several checks, one after the other."""

    checks: tuple[Check, ...]

    @property
    def identity(self) -> Any:
        """What is checked, as a key of cached rows."""
        return [check.identity for check in self.checks]

    def __call__(self, chunks: Iterator[Chunk], location: Callable[[int], str]) -> Iterator[Chunk]:
        """Pass the rows through all of them."""
        for check in self.checks:
            chunks = check(chunks, location)
        return chunks


def readable_references(stage: Any, where: str, need: DataRole) -> Check | None:
    """The check for what a stage or the evaluation at key path `where` reads of its rows; None if there is nothing.

    Rewards read answers and tests, an advantage what its arguments name, a teacher the columns of its prompt.

    Raises:
        RecipeError: a reward runs programs, and no sandbox holds here as it asks for.
    """
    columns: dict[tuple[str, str], None] = {}
    for leaf, place in reward_leaves(getattr(stage, "rewards", []), where):
        if leaf.fn in _READ:
            columns[leaf.fn, leaf.args.get("column", _READ[leaf.fn][0])] = None
        if leaf.fn == "code":
            checked(leaf.args, f"{place}.args")
    advantage = getattr(stage, "advantage", None)
    for argument, (given, _) in READS.items():
        if advantage is not None and info_of(advantage, ADVANTAGE).takes(given):
            columns[argument, advantage.args[argument]] = None
    rewards = ReadableReferences(tuple(columns), need is DataRole.recorded) if columns else None
    template = getattr(stage, KEY, None)
    if template is None:
        return rewards
    teacher = FillsTemplate(template, where)
    return teacher if rewards is None else Every((rewards, teacher))


def _reader(what: str) -> Callable[[Mapping[str, Any], str], object]:
    """What reads a row's column for a reward function, or for an argument of an advantage."""
    if what in _READ:
        return _READ[what][1]
    return lambda example, column: READS[what][1](example, column, f"advantage.args.{what}")
