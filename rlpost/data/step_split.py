"""Splits completions into steps by a text that ends each.

A step is counted in actions: tokens of an environment belong to no step.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from rlpost.data.visible import visible
from rlpost.types import Completion, Group


def split_steps(group: Group, tokenizer: Any, step_end: str, ends: Collection[int]) -> Group:
    """The group with the `steps` of every completion: the number of actions of each.

    A step ends with the token that completes `step_end`; with an empty text every token is a step. The token that
    ends the completion, one of `ends`, belongs to the last step and has no text.
    """
    return replace(group, completions=tuple(_divided(c, tokenizer, step_end, ends) for c in group.completions))


def step_texts(completion: Completion, tokenizer: Any, ends: Collection[int]) -> list[str]:
    """The text of each step of a completion."""
    ids = _actions(completion)
    texts, start = [], 0
    for length in completion.steps.tolist():
        texts.append(visible(ids[start : start + length], tokenizer, ends))
        start += length
    return texts


def step_starts(completion: Completion) -> list[int]:
    """Index into `ids` of the first action of each step."""
    before = np.cumsum(completion.steps) - completion.steps
    firsts: list[int] = np.flatnonzero(completion.action)[before].tolist()
    return firsts


def ends_of(completion: Completion) -> list[bool]:
    """For every action, whether a step ends with it."""
    ends: list[bool] = []
    for length in completion.steps.tolist():
        ends += [False] * (length - 1) + [True]
    return ends


def _divided(completion: Completion, tokenizer: Any, step_end: str, ends: Collection[int]) -> Completion:
    ids = _actions(completion)
    lengths, since, text, found = [], 0, "", 0
    for token in ids:
        piece = visible([token], tokenizer, ends)
        text += piece
        since += 1
        over = bool(piece) if not step_end else text.count(step_end) > found
        if over:
            found = text.count(step_end) if step_end else 0
            lengths.append(since)
            since = 0
    if since and lengths and not visible(ids[len(ids) - since :], tokenizer, ends):
        lengths[-1] += since
    elif since:
        lengths.append(since)
    return replace(completion, steps=np.array(lengths, np.int32), step_rewards=np.zeros(0))


def _actions(completion: Completion) -> list[int]:
    ids: list[int] = completion.ids[completion.action].tolist()
    return ids
