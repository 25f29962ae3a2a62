"""Prompts with privileged context: what a teacher is shown instead of the student's prompt, over the row's columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlpost.data.codec import Codec
from rlpost.data.columns import Naming
from rlpost.data.dataset import Dataset
from rlpost.data.encoders import as_messages, conversation_prompt, plain_prompt
from rlpost.data.files import Chunk
from rlpost.data.messages import opening
from rlpost.data.params import TooLong
from rlpost.errors import DataError
from rlpost.types import Group, Ids

KEY = "privileged"
"""The key of a stage that has the template."""


class Privileged:
    """Shows groups to a teacher under another prompt; their completions stay."""

    def __init__(self, template: str, codec: Codec, room: int, too_long: TooLong, where: str) -> None:
        """Read the template.

        Args:
            template: with columns in braces; `{prompt}` is the student's prompt, of a conversation its last message.
            codec: the student's.
            room: most tokens of a prompt.
            too_long: what becomes of longer ones.
            where: key path of the stage.
        """
        self._naming = Naming({KEY: template}, where)
        self._codec = replace(codec, strict=False)
        self._room = room
        self._refuses = too_long is TooLong.refuse
        self._where = where
        self._known: dict[bytes, Ids] = {}

    def check(self, data: Dataset) -> int:
        """Render every row's prompt; returns the number of those that are too long.

        Raises:
            DataError: a row lacks a column, its prompt is too long and such are refused, or all prompts are too long.
        """
        long = rows = 0
        for group, location in data.located():
            length = len(self._ids(group, location))
            if length > self._room and self._refuses:
                raise DataError(
                    f"{self._where}.{KEY}: {location} has a prompt of {length} tokens for the teacher, the limit is "
                    f"{self._room}: raise max_length, or set too_long=drop"
                )
            long, rows = long + (length > self._room), rows + 1
        if rows and long == rows:
            raise DataError(
                f"{self._where}.{KEY}: none of {rows} prompts for the teacher fits {self._room} tokens: raise "
                "max_length"
            )
        return long

    def shown(self, groups: Sequence[Group]) -> list[Group]:
        """The groups as the teacher reads them."""
        return [Group(self.prompt(g), g.completions, g.example) for g in groups]

    def fits(self, group: Group) -> bool:
        """Whether the teacher's prompt is within its limit."""
        return len(self.prompt(group)) <= self._room

    def prompt(self, group: Group) -> Ids:
        """[L] token ids of the teacher's prompt, kept until `forget`."""
        key = Group(group.prompt, (), group.example).digest()
        if key not in self._known:
            self._known[key] = Group(self._ids(group, f"{self._where}.{KEY}"), ()).prompt
        return self._known[key]

    def forget(self) -> None:
        """Other rows come now."""
        self._known.clear()

    def _ids(self, group: Group, location: str) -> tuple[int, ...]:
        row = dict(group.example)
        text = self._naming(with_question(row), location)[KEY]
        given = _asked(row)
        if isinstance(given, str):
            return plain_prompt(text, self._codec, location)
        *before, last = as_messages(given, "user", location)
        return conversation_prompt(row, [*before, {**last, "content": text}], self._codec, location)


@dataclass(frozen=True)
class FillsTemplate:
    """Checks, while rows are read, that every one has the columns that a template names."""

    template: str
    where: str
    """Key path of the stage."""

    @property
    def identity(self) -> Any:
        """What is checked, as a key of cached rows."""
        return [KEY, self.template]

    def __call__(self, chunks: Iterator[Chunk], location: Callable[[int], str]) -> Iterator[Chunk]:
        """Pass the rows through; raises DataError at the first that lacks a column."""
        naming = Naming({KEY: self.template}, self.where)
        for chunk in chunks:
            for row, number in zip(chunk.rows, chunk.numbers, strict=True):
                naming(with_question(row), location(number))
            yield chunk


def with_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `prompt` as text: of a conversation, that of its last message."""
    asked = _asked(row)
    if isinstance(asked, str):
        return {**row, "prompt": asked}
    last = asked[-1] if asked else {}
    return {**row, "prompt": last.get("content", "") if isinstance(last, Mapping) else ""}


def _asked(row: Mapping[str, Any]) -> Any:
    """The row's prompt: text, or messages."""
    if "prompt" in row or "messages" not in row:
        return row.get("prompt", "")
    return list(opening(row["messages"]))
