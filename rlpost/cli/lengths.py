"""How long a stage's rows are, and how they fill its passes: `rlpost show --rows`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rlpost.data.dataset import Dataset
from rlpost.data.params import DataRole
from rlpost.types import Group

_BARS = 10
_WIDEST = 40
NO_LIMIT = 1 << 30
"""Positions of a model that has no table of them."""
_UPDATES = 50
"""Updates that packing is measured on."""


@dataclass
class Lengths:
    """Numbers of tokens of a stage's rows."""

    prompts: list[int] = field(default_factory=list)
    completions: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Prompt and longest completion of each row, which `max_length` limits."""

    def add(self, group: Group) -> None:
        """Count a row."""
        own = [len(c.ids) for c in group.completions]
        self.prompts.append(len(group.prompt))
        self.completions += own
        self.trained += [c.actions for c in group.completions]
        self.rows.append(len(group.prompt) + max(own, default=0))

    def lines(self) -> Iterator[str]:
        """Least, median and most of each."""
        yield _spread("prompt", self.prompts)
        if self.completions:
            yield _spread("completion", self.completions)
            yield _spread("trained", self.trained)


def _spread(what: str, lengths: Sequence[int]) -> str:
    return f"{what} tokens: least {min(lengths)}, median {median(lengths):g}, most {max(lengths)}"


def histogram(lengths: Sequence[int]) -> Iterator[str]:
    """Bars of how many rows are how long; at most ten, of equal width, 70 columns wide."""
    least, most = min(lengths), max(lengths)
    step = _round_up((most - least + 1) / _BARS)
    start = least // step * step
    counts = [0] * ((most - start) // step + 1)
    for length in lengths:
        counts[(length - start) // step] += 1
    last = start + len(counts) * step - 1
    digits, figures = len(str(last)), len(str(max(counts)))
    for i, count in enumerate(counts):
        low = start + i * step
        bar = "█" * max(round(count / max(counts) * _WIDEST), count > 0)
        name = f"{low:>{digits}}" if step == 1 else f"{low:>{digits}} to {low + step - 1:>{digits}}"
        yield f"{name}  {count:>{figures}}  {bar}".rstrip()


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    size = 1
    while True:
        for step in (size, 2 * size, 5 * size):
            if step >= width:
                return step
        size *= 10


def share(lengths: Sequence[int], part: float) -> int:
    """The length that this part of the rows does not exceed."""
    return sorted(lengths)[max(-(-len(lengths) * int(part * 100) // 100) - 1, 0)]


def limits(lengths: Sequence[int], data: Dataset) -> str:
    """Half of the rows, 95 % of them and the longest; how many were too long."""
    counts = data.outcomes.counts
    words = {"cut": "cut", "dropped": "dropped", "emptied": "dropped without a trained token"}
    too_long = ", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key]) or "none too long"
    limit = f", limit {data.max_length}: {too_long}" if data.max_length < NO_LIMIT else ""
    return f"row lengths: p50 {share(lengths, 0.5)}, p95 {share(lengths, 0.95)}, most {max(lengths)}{limit}"


def packing(stage: Any, data: Dataset, need: DataRole, padded: bool) -> Iterator[str]:
    """How the first updates fill passes of `max_tokens_per_microbatch`, if the stage trains on its rows."""
    from rlpost.train.experience import Experience

    size, budget = getattr(stage, "batch_size", None), getattr(stage, "max_tokens_per_microbatch", None)
    if not size or not budget or need in (DataRole.prompts, DataRole.recorded):
        return
    updates = max(min(_UPDATES, len(data) // size), 1)
    whole = need in (DataRole.pairs, DataRole.triples, DataRole.ranked)
    passes = sequences = real = wide = trained = 0
    for _ in range(updates):
        update = Experience(tuple(data.next(size)))
        for part in update.cut(budget, whole_groups=whole, shared_prompts=not padded):
            lengths = [len(g.prompt) + len(c.ids) for g in part.groups for c in g.completions]
            passes, sequences = passes + 1, sequences + len(lengths)
            once = sum(len(g.prompt) + sum(len(c.ids) for c in g.completions) for g in part.groups)
            real += sum(lengths) if padded else once
            wide += len(lengths) * max(lengths)
            trained += sum(c.actions for g in part.groups for c in g.completions)
    yield (
        f"each pass: sequences {sequences / passes:.3g}, tokens {real / passes:.0f} of at most {budget}, "
        f"{trained / real:.0%} of them trained"
    )
    share_when_padded = f"{min(real / wide, 1):.0%}"
    if padded:
        yield f"padded: {share_when_padded} of its places are tokens"
    else:
        yield f"packed: all of its places are tokens (padded to the longest: {share_when_padded})"
