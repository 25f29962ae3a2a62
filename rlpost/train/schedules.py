"""The learning rate as a function of the number of updates done: no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

from rlpost.train.params import Schedule


def learning_rate_factor(schedule: Schedule, warmup: float, updates: int) -> Callable[[int], float]:
    """update number (from 0) -> factor in (0, 1] on the peak learning rate.

    Args:
        schedule: shape after the warm-up; `linear` and `cosine` go down towards 0 at `updates`.
        warmup: a share of all updates below 1, a number of updates from 1 on; the factor rises linearly.
        updates: how many updates there will be.
    """
    rising = round(warmup * updates) if warmup < 1 else int(warmup)

    def factor(update: int) -> float:
        if update < rising:
            return (update + 1) / rising
        progress = (update - rising) / max(updates - rising, 1)
        if schedule is Schedule.linear:
            return 1.0 - progress
        if schedule is Schedule.cosine:
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor
