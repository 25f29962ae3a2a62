"""Rewards of episodes of several turns."""

from __future__ import annotations

from collections.abc import Sequence

from rlpost.types import Completion


def environment_reward(completion: Completion, steps: Sequence[str]) -> list[float]:
    """What the environment, a class, gave each of the model's turns; 0 where it gave nothing."""
    given: list[float] = completion.step_rewards.tolist()
    return given or [0.0] * len(steps)
