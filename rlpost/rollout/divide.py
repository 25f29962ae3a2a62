"""Completions divided into steps by a text that ends one.

A step is counted in actions: what an environment wrote belongs to no step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlpost.groups import Completion, Group


def divide(group: Group, tokenizer: Any, step_end: str) -> Group:
    """The group with `steps` of every completion filled in: its actions' counts, step by step.

    A step ends with the token that completes `step_end`; with an empty text every token is a step. The token that
    ends the completion belongs to the last step, having no text.
    """
    return replace(group, completions=tuple(_divided(c, tokenizer, step_end) for c in group.completions))


def step_texts(completion: Completion, tokenizer: Any) -> list[str]:
    """The text of each step of a divided completion."""
    ids = _actions(completion)
    texts, start = [], 0
    for length in completion.steps:
        texts.append(tokenizer.decode(list(ids[start : start + length]), skip_special_tokens=True))
        start += length
    return texts


def step_starts(completion: Completion) -> list[int]:
    """Index into `ids` of the first action of each step."""
    where = [i for i, acted in enumerate(completion.action) if acted]
    firsts, start = [], 0
    for length in completion.steps:
        firsts.append(where[start])
        start += length
    return firsts


def ends_of(completion: Completion) -> list[bool]:
    """For every action, whether a step ends with it."""
    ends: list[bool] = []
    for length in completion.steps:
        ends += [False] * (length - 1) + [True]
    return ends


def _divided(completion: Completion, tokenizer: Any, step_end: str) -> Completion:
    ids = _actions(completion)
    lengths, since, text, found = [], 0, "", 0
    for token in ids:
        piece = tokenizer.decode([token], skip_special_tokens=True)
        text += piece
        since += 1
        ends = bool(piece) if not step_end else text.count(step_end) > found
        if ends:
            found = text.count(step_end) if step_end else 0
            lengths.append(since)
            since = 0
    if since and lengths and not _visible(ids[len(ids) - since :], tokenizer):
        lengths[-1] += since
    elif since:
        lengths.append(since)
    return replace(completion, steps=tuple(lengths))


def _actions(completion: Completion) -> list[int]:
    return [token for token, acted in zip(completion.ids, completion.action, strict=True) if acted]


def _visible(ids: list[int], tokenizer: Any) -> bool:
    return bool(tokenizer.decode(ids, skip_special_tokens=True))
