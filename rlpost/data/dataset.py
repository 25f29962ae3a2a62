"""A stage's data: sources, read and tokenised once, in an endless order that can be resumed exactly."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlpost.data.codec import Codec
from rlpost.data.direction import backwards
from rlpost.data.formats import Format, Need, encode, recognise, row_texts, untrained_turns
from rlpost.data.order import Order
from rlpost.data.sources import Bind, Row, label, read
from rlpost.data.visible import visible
from rlpost.errors import DataError, RecipeError, RlpostError
from rlpost.groups import Completion, Group
from rlpost.recipe.schema import Direction, Source, TooLong

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
    present: Present | None = None
    direction: Direction = Direction.forward


class Dataset:
    """The rows of a stage as groups, drawn in order."""

    def __init__(
        self,
        parts: Sequence[Part],
        codec: Codec,
        limit: Limit,
        seed: int,
        counts: Counter[str],
        allow_change: bool = False,
    ) -> None:
        self._parts = list(parts)
        self._codec = codec
        self._limit = limit
        self._seed = seed
        self._allow_change = allow_change
        self._order = Order([len(p.rows) for p in parts], [p.weight for p in parts], seed)
        self.counts: Mapping[str, int] = counts
        """Rows read, kept, dropped and cut (too long), emptied (nothing trained left), last_turn_only."""

    def __len__(self) -> int:
        """Rows of all sources together."""
        return sum(len(part.rows) for part in self._parts)

    @property
    def epoch_length(self) -> int:
        """Rows of one epoch (of a mixture: of all sources together)."""
        return self._order.epoch_length

    @property
    def is_presented(self) -> bool:
        """True where rows change every time they are drawn."""
        return any(part.present is not None for part in self._parts)

    @property
    def notices(self) -> list[str]:
        """What to say aloud: the formats recognised, and what became of rows that did not fit."""
        lines = [f"{p.label}: {len(p.rows)} rows, read as {p.format.value}" for p in self._parts]
        limit = self._limit.max_length
        said = {
            "dropped": f"rows dropped: longer than {limit} tokens",
            "cut": f"rows cut to {limit} tokens; what was cut is not taught to stop there",
            "emptied": f"rows dropped: {limit} tokens leave nothing of the completion to train",
            "last_turn_only": "rows train their last turn only: the chat template changes earlier ones",
        }
        return lines + [
            f"{self.counts[key]} of {self.counts['read']} {text}" for key, text in said.items() if self.counts[key]
        ]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all rows and weights, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(json.dumps([part.weight, part.rows], sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    def next(self, n: int) -> list[Group]:
        """The next `n` groups.

        Raises:
            DataError: a row as presented this time is malformed or too long.
        """
        drawn: list[Group] = []
        passed_over = 0
        while len(drawn) < n:
            draw = self._order.next()
            part = self._parts[draw.source]
            if part.present is None:
                drawn.append(part.groups[draw.row])
                continue
            group = _presented(part, draw.row, draw.seed, self._codec, self._limit, Counter())
            if group is not None:
                drawn.append(group)
                continue
            passed_over += 1
            if passed_over > 10 * len(self):
                raise DataError(f"{part.label}: rows as presented are all longer than {self._limit.max_length} tokens")
        return drawn

    def all(self) -> list[Group]:
        """Every row once, in the order of the sources; the rows' turns in `next` are not touched."""
        groups: list[Group] = []
        for part in self._parts:
            if part.present is None:
                groups += part.groups
                continue
            for i in range(len(part.rows)):
                group = _presented(part, i, self._seed + i, self._codec, self._limit, Counter())
                groups += [] if group is None else [group]
        return groups

    def state(self) -> dict[str, Any]:
        """Where the data stands, as JSON."""
        return {"order": self._order.state(), "fingerprint": self.fingerprint}

    def load(self, state: Mapping[str, Any], *, allow_change: bool = False) -> None:
        """Continue from `state()`: the groups that follow are those that would have followed.

        Raises:
            DataError: the rows are not those of the state (`allow_change`, here or when it was opened, allows
            it while their number is the same).
        """
        if state["fingerprint"] != self.fingerprint and not (allow_change or self._allow_change):
            raise DataError(
                f"the data has changed since this run began ({state['fingerprint']} -> {self.fingerprint}): "
                "restore it, pass --allow-change, or start another run with run=NAME"
            )
        self._order.load(state["order"])


def open_dataset(
    sources: Mapping[str, Source],
    codec: Codec,
    *,
    need: Need,
    limit: Limit,
    seed: int,
    where: str,
    stages: Callable[[str], Path],
    bind: Bind,
    base: Path = Path(),
    allow_change: bool = False,
) -> Dataset:
    """Read and encode `sources`, which stand at the key path `where`, for what `need` says.

    Raises:
        DataError: a source cannot be read, a row is malformed or too long, or none is left.
        ModelError: conversations, and no chat template.
    """
    if not sources:
        raise RecipeError(f"{where} names no source: give at least one, like {where}: {{main: {{path: FILE.jsonl}}}}")
    counts: Counter[str] = Counter()
    parts = []
    for name, source in sources.items():
        key = f"{where}.{name}"
        rows = read(source, stages=stages, where=key, bind=bind, base=base)
        present = bind(source.present, "present", f"{key}.present", base) if source.present else None
        parts.append(_part(source, key, rows, present, need, codec, limit, seed, counts))
    return Dataset(parts, codec, limit, seed, counts, allow_change)


def texts(
    sources: Mapping[str, Source],
    *,
    where: str,
    stages: Callable[[str], Path],
    bind: Bind,
    base: Path = Path(),
) -> list[str]:
    """All text of the sources' rows, for training a tokenizer.

    Raises:
        DataError: a source cannot be read, or has no text in a column that a format knows.
    """
    found: list[str] = []
    for name, source in sources.items():
        rows = read(source, stages=stages, where=f"{where}.{name}", bind=bind, base=base)
        own = [text for row in rows for text in row_texts(row)]
        if not own:
            recognise(rows, label(source, f"{where}.{name}"))
            raise DataError(f"{label(source, f'{where}.{name}')} holds no text")
        found += own
    return found


def _part(
    source: Source,
    key: str,
    rows: list[Row],
    present: Present | None,
    need: Need,
    codec: Codec,
    limit: Limit,
    seed: int,
    counts: Counter[str],
) -> Part:
    """Encode every row once, also those that are presented anew: what is wrong shows before training."""
    place = label(source, key)
    sample = rows[0] if present is None else _present(present, rows[0], seed, f"{place} row 1")
    part = Part(place, source.weight, rows, recognise([sample], place, need), (), present, source.direction)
    encoded = [_presented(part, i, seed + i, codec, limit, counts) for i in range(len(rows))]
    kept = [(row, group) for row, group in zip(rows, encoded, strict=True) if group is not None]
    counts["read"] += len(rows)
    counts["kept"] += len(kept)
    if not kept:
        raise DataError(f"{place}: none of {len(rows)} rows fits {limit.max_length} tokens: raise max_length")
    if present is not None:
        return part
    return replace(part, rows=[row for row, _ in kept], groups=[group for _, group in kept])


def _presented(part: Part, i: int, seed: int, codec: Codec, limit: Limit, counts: Counter[str]) -> Group | None:
    """Row `i` as a group that fits; None when it is dropped."""
    place = f"{part.label} row {i + 1}"
    row = part.rows[i] if part.present is None else _present(part.present, part.rows[i], seed, place)
    group = encode(row, part.format, codec, place)
    if part.format is Format.messages:
        counts["last_turn_only"] += untrained_turns(row, group)
    if part.direction is Direction.reverse:
        if len(group.completions) != 1:
            raise DataError(f"{place}: several completions of a prompt are no one text to reverse; give each a row")
        group = backwards(group, codec)
    return fit(group, limit, codec, place, counts)


def _present(present: Present, row: Row, seed: int, place: str) -> Row:
    try:
        shown = present(row=dict(row), random=random.Random(seed))
    except RlpostError as error:
        raise type(error)(f"{place}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{place}: present failed with {type(error).__name__}: {reason}") from error
    if not isinstance(shown, Mapping):
        raise DataError(f"{place}: present returned {type(shown).__name__}: return a row (a dict)")
    return dict(shown)


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
    whole = any(c.steps or c.logprobs for c in group.completions)
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
    text = visible(ids, codec.tokenizer, codec.stops)
    return replace(completion, ids=ids, action=completion.action[:room], text=text)
