"""Rewards of groups: every reward function on every completion, and their weighted sum."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlpost.errors import RecipeError
from rlpost.rewards.call import ByStep, Given, caller
from rlpost.rewards.tree import BoundReward, Reward, evaluate, leaves, names, weighted_sum
from rlpost.types import FAILED, Completion, Group, completions

__all__ = ["BoundReward", "Nested", "RewardBatch", "Scorer", "joined", "mean", "rewarded"]

Nested = list[list[float | None]]
"""[P][G] one number a completion, None where it is unscored."""


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of P groups of G completions (groups may differ in size).

    Example: one prompt with two completions, rewards right (weight 1) and brief (weight 0.5):
    ``RewardBatch(total=[[1.5, None]], by_name={"right": [[1.0, None]], "brief": [[1.0, 0.0]]})``.
    """

    total: Nested
    """[P][G] weighted sums; None where any reward with a weight other than 0 is None."""
    by_name: dict[str, Nested]
    """[P][G] each reward and each node of the tree, without its weight."""
    by_step: dict[str, list[list[float]]] = field(default_factory=dict)
    """[S] what rewards by step gave each step of a completion, by name."""
    given: bool = True
    """Whether there are rewards: False of a stage that has none, whose totals are 0."""

    def means(self) -> dict[str, float]:
        """Mean of each reward over the completions it scored; rewards that scored none are left out."""
        means = {name: mean(values) for name, values in self.by_name.items()}
        return {name: value for name, value in means.items() if value is not None}

    @property
    def unscored(self) -> int:
        """Number of completions without a total."""
        return sum(value is None for row in self.total for value in row)


def mean(values: Nested) -> float | None:
    """Mean over the scored completions, None when there are none."""
    scored = [value for row in values for value in row if value is not None]
    return math.fsum(scored) / len(scored) if scored else None


def joined(batches: Sequence[RewardBatch], order: Sequence[int]) -> RewardBatch:
    """The groups of several batches, concatenated and then taken in `order`."""

    def groups(parts: Sequence[Nested]) -> Nested:
        flat = [row for part in parts for row in part]
        return [flat[i] for i in order]

    def steps(name: str) -> list[list[float]]:
        # By completion; nest them by group, like the totals, to take groups in order.
        cut = [row for s in batches for row in _nest(s.by_step[name], s.total)]
        return [step for i in order for step in cut[i]]

    first = batches[0]
    by_name = {name: groups([s.by_name[name] for s in batches]) for name in first.by_name}
    total = groups([s.total for s in batches])
    return RewardBatch(total, by_name, {name: steps(name) for name in first.by_step}, first.given)


def rewarded(groups: Sequence[Group], totals: Nested) -> list[Group]:
    """The groups, each completion with its total reward [P][G]: None where it is unscored."""

    def own(group: Group, row: Sequence[float | None]) -> tuple[Completion, ...]:
        return tuple(c.rewarded(reward) for c, reward in zip(group.completions, row, strict=True))

    return [replace(group, completions=own(group, row)) for group, row in zip(groups, totals, strict=True)]


class Scorer:
    """Calls reward functions and combines their results.

    Raises:
        RecipeError: no rewards, two of one name, or a function that does not take what it is given.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        if not rewards:
            raise RecipeError("rewards: there are none; add one, such as {fn: math_answer}")
        self.rewards = list(rewards)
        found = list(names(self.rewards))
        for name in found:
            if found.count(name) > 1:
                raise RecipeError(f"rewards: two are called {name!r}; give one of them another `name`")
        self._calls = {leaf.name: caller(leaf) for leaf in leaves(self.rewards)}
        self.seconds = 0.0
        """Spent in `score` so far."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward of the list, by name."""
        return {reward.name: reward.weight for reward in self.rewards}

    def score(self, groups: Sequence[Group], steps: Sequence[Sequence[str]] | None = None) -> RewardBatch:
        """Reward every completion of every group.

        Args:
            groups: with completions.
            steps: [S] the texts of each completion's steps, for rewards by step.

        Raises:
            RewardError: a reward raised, or returned something that is not a finite number or None.
        """
        if any(c.finish == FAILED for c in completions(groups)):
            return self._without_failed(groups, steps)
        began = time.perf_counter()
        given = Given(
            groups=list(groups),
            completions=completions(groups),
            examples=[group.example for group in groups for _ in group.completions],
            steps=steps,
        )
        by_step: dict[str, list[list[float]]] = {}
        values: dict[str, Sequence[float | None]] = {}
        for name, call in self._calls.items():
            found = call(given)
            if isinstance(found, ByStep):
                by_step[name] = found.steps
                values[name] = [math.fsum(own) if own else None for own in found.steps]
            else:
                values[name] = found
        by_name: dict[str, Sequence[float | None]] = {}
        columns = [evaluate(reward, values, by_name, by_step) for reward in self.rewards]
        weights = [reward.weight for reward in self.rewards]
        sums = [weighted_sum(column, weights) for column in zip(*columns, strict=True)]
        shape = [[None for _ in group.completions] for group in groups]
        named = {name: _nest(list(by_name[name]), shape) for name in names(self.rewards)}
        self.seconds += time.perf_counter() - began
        return RewardBatch(_nest(sums, shape), named, by_step)

    def _without_failed(self, groups: Sequence[Group], steps: Sequence[Sequence[str]] | None) -> RewardBatch:
        """The rewards of groups with failed episodes, which reward functions do not see and which have no reward."""
        failed = [c.finish == FAILED for c in completions(groups)]
        whole = [replace(g, completions=tuple(c for c in g.completions if c.finish != FAILED)) for g in groups]
        own_steps = None if steps is None else [own for own, out in zip(steps, failed, strict=True) if not out]
        scores = self.score([g for g in whole if g.completions], own_steps)

        def spread(values: Iterable[Any], gap: Any) -> list[Any]:
            every = iter(values)
            return [gap if out else next(every) for out in failed]

        def nested(values: Nested) -> Nested:
            return _nest(spread((x for row in values for x in row), None), [g.completions for g in groups])

        by_name = {name: nested(values) for name, values in scores.by_name.items()}
        return RewardBatch(nested(scores.total), by_name, {n: spread(rows, []) for n, rows in scores.by_step.items()})


class Unrewarded(Scorer):
    """Of a stage that learns from its samples without rewards: 0 for every completion but those that failed."""

    def __init__(self) -> None:
        self.rewards = []
        self.seconds = 0.0

    def score(self, groups: Sequence[Group], steps: Sequence[Sequence[str]] | None = None) -> RewardBatch:
        """No rewards by name; a failed episode has no total."""
        del steps
        total: Nested = [[None if c.finish == FAILED else 0.0 for c in g.completions] for g in groups]
        return RewardBatch(total, {}, given=False)


def _nest(flat: Sequence[Any], shape: Sequence[Sequence[Any]]) -> list[list[Any]]:
    values = iter(flat)
    return [[next(values) for _ in row] for row in shape]
