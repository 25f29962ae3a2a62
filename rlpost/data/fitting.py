"""Applies length limits to groups, and counts rows that are dropped, cut or changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlpost.data.codec import Codec
from rlpost.data.params import TooLong
from rlpost.data.visible import visible
from rlpost.errors import DataError
from rlpost.types import Completion, Group


@dataclass(frozen=True)
class Limit:
    """The length limit of rows."""

    max_length: int
    """Tokens of the prompt and its longest completion together (of the prompt, where rows are prompts)."""
    too_long: TooLong = TooLong.refuse
    of_model: bool = False
    """The limit is the model's positions, so no setting can raise it."""

    @classmethod
    def within(cls, wanted: int, positions: int, too_long: TooLong) -> Limit:
        """The recipe's limit, or the model's positions if those are fewer."""
        return cls(min(wanted, positions), too_long, of_model=wanted > positions)


@dataclass
class RowOutcomes:
    """Counts of rows kept, dropped, cut and changed."""

    counts: Counter[str] = field(default_factory=Counter)
    """Rows `read` and `kept`, and those of every key of `_NOTICES`."""
    first: dict[str, str] = field(default_factory=dict)
    """Kind -> its first row, in words."""
    plain: dict[str, int] = field(default_factory=dict)
    """Label of a source -> plain-text rows of a chat model, which skip its template."""

    def add(self, other: RowOutcomes) -> None:
        """Add the counts of more rows."""
        self.counts += other.counts
        self.first = {**other.first, **self.first}
        self.plain |= other.plain

    def to_json(self) -> dict[str, Any]:
        """All counts as JSON."""
        return {"counts": dict(self.counts), "first": self.first, "plain": self.plain}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RowOutcomes:
        """The counts that `to_json` returned."""
        return cls(Counter(saved["counts"]), dict(saved["first"]), dict(saved["plain"]))

    def nothing_left(self, about: str, longest: int) -> str:
        """Why no row is left, in words."""
        rows = self.counts["read"]
        if self.counts["dropped"] + self.counts["emptied"] == rows:
            return f"{about}: none of {rows} rows fits {longest} tokens: raise max_length"
        reasons = [
            f"{self.counts[key]} {text.removeprefix('rows ').format(longest=longest)}"
            for key, text in _NOTICES.items()
            if self.counts[key]
        ]
        return f"{about}: none of {rows} rows is left: {'; '.join(reasons)}"

    def notices(self, longest: int) -> list[str]:
        """One line for each kind of row that there was."""
        lines = []
        for about, n in self.plain.items():
            lines.append(
                f"{about}: {n} rows are plain text, which does not go through the model's chat template; to ask it in "
                "its own format, give prompts as messages: [{role: user, content: ...}]"
            )
        for key, text in _NOTICES.items():
            if self.counts[key]:
                first = f" (first: {self.first[key]})" if key in self.first else ""
                lines.append(f"{self.counts[key]} of {self.counts['read']} {text.format(longest=longest)}{first}")
        return lines


_NOTICES = {
    "dropped": "rows dropped: longer than {longest} tokens",
    "cut": "rows cut to {longest} tokens; what was cut is not taught to stop there",
    "emptied": "rows dropped: {longest} tokens leave nothing of the completion to train",
    "equal": "rows dropped: their completions are the same, token by token, so none is better",
    "malformed": "rows dropped: they break their format",
    "unrendered": "rows dropped: the chat template leaves out a part of them",
    "ignored": "rows are read without what the chat template leaves out",
    "turns": "rows leave earlier turns untrained: the chat template changes them",
}
"""Kind of rows -> the notice about them."""


def fit(group: Group, limit: Limit, codec: Codec, location: str, counts: Counter[str]) -> Group | None:
    """The group within its limit, or None if it is dropped; adds to `counts`.

    A prompt is never cut. A cut completion loses its end token, so the model does not learn to stop there.

    Raises:
        DataError: it is too long and `too_long` is refuse.
    """
    length = len(group.prompt) + max((len(c.ids) for c in group.completions), default=0)
    if length <= limit.max_length:
        return group
    if limit.too_long is TooLong.refuse:
        what = "has" if group.completions else "has a prompt of"
        raise DataError(
            f"{location} {what} {length} tokens, the limit is {limit.max_length}"
            f"{', the positions of the model: ' if limit.of_model else ': raise max_length, or '}"
            "set too_long=drop or too_long=cut"
        )
    # Step labels and recorded log-probabilities are those of whole completions, which cannot be cut.
    whole = any(len(c.steps) or len(c.logprobs) for c in group.completions)
    if limit.too_long is TooLong.drop or not group.completions or whole:
        counts["dropped"] += 1
        return None
    room = max(limit.max_length - len(group.prompt), 0)
    cut = tuple(_cut(c, room, codec) for c in group.completions)
    if not all(c.actions for c in cut):
        counts["emptied"] += 1
        return None
    counts["cut"] += 1
    return replace(group, completions=cut)


def _cut(completion: Completion, room: int, codec: Codec) -> Completion:
    if len(completion.ids) <= room:
        return completion
    ids = completion.ids[:room]
    text = visible(ids.tolist(), codec.tokenizer, codec.stops)
    return replace(completion, ids=ids, action=completion.action[:room], text=text)
