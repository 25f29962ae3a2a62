"""Completions that nothing is learned from: they stay in their groups, and have no actions there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlpost.types import Completion, Group


def excluding(groups: Sequence[Group], out: Sequence[Sequence[bool]]) -> list[Group]:
    """The groups, without the actions of those completions that are out."""
    return [
        replace(g, completions=tuple(without_actions(c) if o else c for c, o in zip(g.completions, row, strict=True)))
        for g, row in zip(groups, out, strict=True)
    ]


def without_actions(completion: Completion) -> Completion:
    """The completion as nothing is learned from it."""
    nothing = {name: getattr(completion, name)[:0] for name in ("logprobs", "steps", "step_labels", "step_rewards")}
    return replace(completion, action=np.zeros(len(completion.ids), np.bool_), **nothing)
