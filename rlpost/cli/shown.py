"""`rlpost show --rows`: the first rows of each stage as the model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlpost import console
from rlpost.cli.lengths import Lengths, histogram, limits, packing
from rlpost.data.codec import Codec, make_codec
from rlpost.data.dataset import Dataset
from rlpost.data.formats import DataRole
from rlpost.policy.params import Attention
from rlpost.recipe.resolve import Resolved
from rlpost.types import Group


def show_rows(resolved: Resolved, n: int) -> list[str]:
    """Lines with the first `n` rows of each stage, and their lengths in tokens.

    Trained tokens are marked: in colour on a terminal, between » and « elsewhere. Scores, labels and the like stand
    before their completion.
    """
    from rlpost.inference.recipe_model import positions_in, tokenizer_of
    from rlpost.stage_rows import open_rows, own_sources

    lines: list[str] = []
    codec: Codec | None = None
    for name, stage in resolved.config.stages.items():
        if not stage.enabled or not own_sources(stage):
            continue
        if codec is None:
            codec, positions = make_codec(tokenizer_of(resolved)), positions_in(resolved)
        data = open_rows(resolved, name, codec, positions)
        lines += [f"stages.{name}", *(f"  {console.clean(line)}" for line in data.notices)]
        lines += (f"  {line}" for line in _lines(resolved, stage, data, codec.tokenizer, n))
    return lines


def _lines(resolved: Resolved, stage: Any, data: Dataset, tokenizer: Any, n: int) -> Iterator[str]:
    counted = Lengths()
    first: list[Group] = []
    for group in data.every():
        counted.add(group)
        if len(first) < n:
            first.append(group)
    need = stage.rows()
    yield limits(counted.rows, data)
    yield from (f"  {line}" for line in histogram(counted.rows))
    yield from packing(stage, data, need, padded=resolved.config.model.attention is Attention.padded)
    yield from counted.lines()
    for group in first:
        yield from _shown(tokenizer, group, need)


def _shown(tokenizer: Any, group: Group, need: DataRole) -> Iterator[str]:
    prompt = console.clean(tokenizer.decode(group.prompt.tolist()), "⏎")
    if not group.completions:
        yield prompt
    for c, annotation in zip(group.completions, _annotations(group, need), strict=True):
        text = prompt
        start = 0
        while start < len(c.ids):
            end = start
            while end < len(c.ids) and c.action[end] == c.action[start]:
                end += 1
            piece = console.clean(tokenizer.decode(c.ids[start:end].tolist()), "⏎")
            text += console.marked(piece) if c.action[start] else piece
            start = end
        yield f"{annotation}{text}"


def _annotations(group: Group, need: DataRole) -> list[str]:
    """The score, label or rank of each completion, to print before it."""
    several = len(group.completions)
    if need is DataRole.pairs:
        return ["chosen:   ", "rejected: "]
    if need is DataRole.triples:
        return ["chosen:    ", "rejected:  ", "reference: "]
    if need is DataRole.ranked:
        return [f"score {_figure(c.score)}: " for c in group.completions]
    if need is DataRole.labelled:
        return [f"label {str(c.label).lower()}: " for c in group.completions]
    if need is DataRole.steps:
        return [f"labels {', '.join(f'{label:g}' for label in c.step_labels)}: " for c in group.completions]
    if need is DataRole.recorded:
        return [f"reward {_figure(c.reward)}: " for c in group.completions]
    return [f"{i}: " for i in range(1, several + 1)] if several > 1 else [""] * several


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
