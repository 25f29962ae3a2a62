"""One source of a stage's data: its rows as groups that fit, and what became of those that are no part of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlpost.data import params
from rlpost.data.codec import Codec
from rlpost.data.direction import backwards
from rlpost.data.formats import Format, Need, encode, is_plain, recognise, untrained_turns
from rlpost.data.params import Direction, Source, TooLong
from rlpost.data.sources import Row, Rows, label
from rlpost.data.unrendered import Unrendered
from rlpost.data.users import each
from rlpost.data.visible import visible
from rlpost.errors import DataError
from rlpost.types import Completion, Group
from rlpost.usercode.wire import Seeded

Present = Callable[..., Mapping[str, Any]]  # called with row= and random=


@dataclass(frozen=True)
class Limit:
    """How long a row may be."""

    max_length: int
    """Tokens of the prompt and its longest completion together (of the prompt, where rows are prompts)."""
    too_long: TooLong = TooLong.refuse


@dataclass(frozen=True)
class Part:
    """One source, read."""

    label: str
    """For messages: key path and origin."""
    weight: float
    rows: Sequence[Row]
    format: Format
    groups: Sequence[Group]
    """[rows] encoded; empty where rows are presented anew each time."""
    places: Sequence[str]
    """[rows] where each comes from, for messages."""
    present: Present | None = None
    direction: Direction = Direction.forward
    unrendered: params.Unrendered = params.Unrendered.refuse


@dataclass
class Found:
    """What became of the rows of all sources, for the user."""

    counts: Counter[str] = field(default_factory=Counter)
    """Rows read and kept, and those of every key of `_SAID`."""
    first: dict[str, str] = field(default_factory=dict)
    """The first row of a kind, in words."""
    plain: dict[str, int] = field(default_factory=dict)
    """Label of a source -> rows that a chat model reads without its template."""

    def notices(self, longest: int) -> list[str]:
        """One line for each kind of row that there was."""
        lines = []
        for about, n in self.plain.items():
            lines.append(
                f"{about}: {n} rows are plain text, which does not go through the model's chat template; to ask it in "
                "its own format, give prompts as messages: [{role: user, content: ...}]"
            )
        for key, text in _SAID.items():
            if self.counts[key]:
                first = f" (first: {self.first[key]})" if key in self.first else ""
                lines.append(f"{self.counts[key]} of {self.counts['read']} {text.format(longest=longest)}{first}")
        return lines


_SAID = {
    "dropped": "rows dropped: longer than {longest} tokens",
    "cut": "rows cut to {longest} tokens; what was cut is not taught to stop there",
    "emptied": "rows dropped: {longest} tokens leave nothing of the completion to train",
    "equal": "rows dropped: their completions are the same, token by token, so none is better",
    "unrendered": "rows dropped: the chat template leaves out a part of them",
    "ignored": "rows are read without what the chat template leaves out",
    "turns": "rows leave earlier turns untrained: the chat template changes them",
}
"""Kinds of rows, and what is said of them."""


def open_part(
    source: Source,
    key: str,
    found: Rows,
    present: Present | None,
    need: Need,
    codec: Codec,
    limit: Limit,
    seed: int,
    became: Found,
) -> Part:
    """Encode every row once, also those that are presented anew: what is wrong shows before training.

    Raises:
        DataError: a row is malformed or too long, or none is left.
    """
    about = label(source, key)
    places = [f"{key} ({p})" if source.path and p.startswith(source.path) else f"{about} {p}" for p in found.places]
    sample = found.rows[0] if present is None else _shown(present, found.rows[:1], [seed], places[:1])[0]
    form = recognise([sample], about, need)
    part = Part(about, source.weight, found.rows, form, (), places, present, source.direction, source.unrendered)
    before = Counter(became.counts)
    every = range(len(found.rows))
    encoded = present_rows(part, every, [seed + i for i in every], codec, limit, became)
    kept = [i for i, group in enumerate(encoded) if group is not None]
    became.counts["read"] += len(encoded)
    became.counts["kept"] += len(kept)
    if not kept:
        raise DataError(_nothing_left(about, len(encoded), became.counts - before, limit))
    groups = [group for group in encoded if group is not None]
    if codec.template is not None:
        plain = sum(is_plain(g.example, form, codec.template.stop) for g in groups)
        became.plain |= {about: plain} if plain else {}
    if present is not None:
        return part
    return replace(part, rows=[found.rows[i] for i in kept], groups=groups, places=[places[i] for i in kept])


def _nothing_left(about: str, rows: int, counts: Counter[str], limit: Limit) -> str:
    if counts["dropped"] + counts["emptied"] == rows:
        return f"{about}: none of {rows} rows fits {limit.max_length} tokens: raise max_length"
    reasons = [
        f"{counts[key]} {text.removeprefix('rows ').format(longest=limit.max_length)}"
        for key, text in _SAID.items()
        if counts[key]
    ]
    return f"{about}: none of {rows} rows is left: {'; '.join(reasons)}"


def present_rows(
    part: Part, indices: Sequence[int], seeds: Sequence[int], codec: Codec, limit: Limit, became: Found
) -> list[Group | None]:
    """Rows as groups that fit, or None where one is dropped; `became` is added to.

    Raises:
        DataError: one is malformed or too long.
    """
    rows, places = [part.rows[i] for i in indices], [part.places[i] for i in indices]
    if part.present is not None:
        rows = _shown(part.present, rows, seeds, places)
    return [_encoded(part, row, place, codec, limit, became) for row, place in zip(rows, places, strict=True)]


def _encoded(part: Part, row: Row, place: str, codec: Codec, limit: Limit, became: Found) -> Group | None:
    try:
        group = encode(row, part.format, codec, place)
    except Unrendered as error:
        if part.unrendered is params.Unrendered.refuse:
            raise
        kind = "unrendered" if part.unrendered is params.Unrendered.drop else "ignored"
        became.counts[kind] += 1
        became.first.setdefault(kind, f"{place}: {error.left_out}")
        if part.unrendered is params.Unrendered.drop:
            return None
        group = encode(row, part.format, replace(codec, strict=False), place)
    if part.format is Format.messages:
        became.counts["turns"] += untrained_turns(row, group)
    if part.direction is Direction.reverse:
        if len(group.completions) != 1:
            raise DataError(f"{place}: several completions of a prompt are no one text to reverse; give each a row")
        group = backwards(group, codec)
    fitting = fit(group, limit, codec, place, became.counts)
    if fitting is not None and part.format in _COMPARED and _is_equal(fitting, part.format):
        became.counts["equal"] += 1
        return None
    return fitting


_COMPARED = (Format.pair, Format.ranked, Format.ranked_pair)
"""Formats whose completions are compared with each other."""


def _is_equal(group: Group, form: Format) -> bool:
    """Whether all completions that are compared are one: they differ by rounding alone, which Adam makes full steps."""
    compared = [c for c in group.completions if form is Format.pair or c.score is not None]
    return len({(c.ids.tobytes(), c.action.tobytes()) for c in compared}) == 1


def _shown(present: Present, rows: Sequence[Row], seeds: Sequence[int], places: Sequence[str]) -> list[Row]:
    """The rows as they are presented this time."""
    calls = [{"row": dict(row), "random": Seeded(seed)} for row, seed in zip(rows, seeds, strict=True)]
    shown = []
    for found, place in zip(each(present, calls, [f"{p}: present" for p in places]), places, strict=True):
        if not isinstance(found, Mapping):
            raise DataError(f"{place}: present returned {type(found).__name__}: return a row (a dict)")
        shown.append(dict(found))
    return shown


def fit(group: Group, limit: Limit, codec: Codec, place: str, counts: Counter[str]) -> Group | None:
    """The group within its limit, or None when it is dropped; `counts` is added to.

    A prompt is never cut. A cut completion loses its end token with its end, so nothing is taught to stop
    there.

    Raises:
        DataError: it is too long and `too_long` is refuse.
    """
    length = len(group.prompt) + max((len(c.ids) for c in group.completions), default=0)
    if length <= limit.max_length:
        return group
    if limit.too_long is TooLong.refuse:
        what = "has" if group.completions else "has a prompt of"
        raise DataError(
            f"{place} {what} {length} tokens, the limit is {limit.max_length}: "
            "raise max_length, or set too_long=drop or too_long=cut"
        )
    # Labels of steps, and log-probabilities of what was sampled, are of whole completions.
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
