"""Rewards of groups: every reward function on every completion, and their weighted sum."""

from __future__ import annotations

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

from rlpost.errors import RecipeError, RewardError, RlpostError
from rlpost.groups import Completion, Group, completions
from rlpost.rewards.tree import BoundReward, Reward, evaluate, leaves, names, weighted_sum

__all__ = ["BoundReward", "Nested", "Scorer", "Scores", "joined", "mean"]

LARGEST = 1e12
"""Largest size of a reward: squares of larger ones, summed over a group, leave float32."""

Nested = list[list[float | None]]
"""[P][G] one number a completion, None where it is unscored."""


@dataclass(frozen=True)
class Scores:
    """Rewards of P groups of G completions (groups may differ in size).

    Example: one prompt with two completions, rewards right (weight 1) and brief (weight 0.5):
    ``Scores(total=[[1.5, None]], by_name={"right": [[1.0, None]], "brief": [[1.0, 0.0]]})``.
    """

    total: Nested
    """[P][G] weighted sums; None where any reward with a weight other than 0 is None."""
    by_name: dict[str, Nested]
    """[P][G] each reward and each node of the tree, without its weight."""
    by_step: dict[str, list[list[float]]] = field(default_factory=dict)
    """[S] what rewards by step gave each step of a completion, by name."""

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


def joined(scores: Sequence[Scores], order: Sequence[int]) -> Scores:
    """The groups of several scores one after the other, those of `order` alone and in that order."""

    def groups(parts: Sequence[Nested]) -> Nested:
        flat = [row for part in parts for row in part]
        return [flat[i] for i in order]

    def steps(name: str) -> list[list[float]]:
        # They lie completion after completion: cut into groups, as the totals are, they can be put in order.
        cut = [row for s in scores for row in _nest(s.by_step[name], s.total)]
        return [step for i in order for step in cut[i]]

    first = scores[0]
    by_name = {name: groups([s.by_name[name] for s in scores]) for name in first.by_name}
    return Scores(groups([s.total for s in scores]), by_name, {name: steps(name) for name in first.by_step})


class Scorer:
    """Calls reward functions and checks what they return. An error in one stops the run, by its name.

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
        self._calls = {leaf.name: _call(leaf) for leaf in leaves(self.rewards)}

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each reward of the list, by name."""
        return {reward.name: reward.weight for reward in self.rewards}

    def score(self, groups: Sequence[Group], steps: Sequence[Sequence[str]] | None = None) -> Scores:
        """Reward every completion of every group.

        Args:
            groups: with completions.
            steps: [S] the texts of each completion's steps, for rewards by step.

        Raises:
            RewardError: a reward raised, or returned something that is not a finite number or None.
        """
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
        seen: dict[str, Sequence[float | None]] = {}
        columns = [evaluate(reward, values, seen, by_step) for reward in self.rewards]
        weights = [reward.weight for reward in self.rewards]
        sums = [weighted_sum(column, weights) for column in zip(*columns, strict=True)]
        shape = [[None for _ in group.completions] for group in groups]
        named = {name: _nest(list(seen[name]), shape) for name in names(self.rewards)}
        return Scores(_nest(sums, shape), named, by_step)


@dataclass(frozen=True)
class Given:
    """What rewards may ask for."""

    groups: list[Group]
    completions: Sequence[Completion]
    """[S]."""
    examples: Sequence[Mapping[str, Any]]
    """[S] the row of each completion."""
    steps: Sequence[Sequence[str]] | None
    """[S] the texts of each completion's steps."""

    def steps_of(self, reward: BoundReward) -> Sequence[Sequence[str]]:
        """The steps, which must be known.

        Raises:
            RecipeError: nobody said what ends a step.
        """
        if self.steps is None:
            raise RecipeError(f"rewards: {reward.name} rewards steps; say what ends one with the stage's `step_end`")
        return self.steps


@dataclass(frozen=True)
class ByStep:
    """[S] numbers for every step of every completion."""

    steps: list[list[float]]


def _nest(flat: Sequence[Any], shape: Sequence[Sequence[Any]]) -> list[list[Any]]:
    values = iter(flat)
    return [[next(values) for _ in row] for row in shape]


_Call = Callable[[Given], "list[float | None] | ByStep"]
_ONE = {"completion", "example", "steps"}
_ALL = {"completions", "examples", "all_steps", "groups"}


def _call(reward: BoundReward) -> _Call:
    """A reward as a function of all completions, whether it takes them one by one or together."""
    asked = set(inspect.signature(reward.function).parameters)
    one, together = asked & {"completion", "steps"}, asked & {"completions", "groups", "all_steps"}
    if bool(one) == bool(together) or (asked & _ONE and asked & _ALL):
        raise RecipeError(
            f"rewards: {reward.name} takes ({', '.join(sorted(asked))}); "
            "a reward takes `completion` and `example`, or `completions` and `examples`"
        )
    names_wanted = asked & (_ALL | _ONE | {"model"})
    return partial(_together if together else _one_by_one, reward, names_wanted)


def _one_by_one(reward: BoundReward, wanted: set[str], given: Given) -> list[float | None] | ByStep:
    values: list[float | None] = []
    by_step: list[list[float]] = []
    for s, (completion, example) in enumerate(zip(given.completions, given.examples, strict=True)):
        supplied: dict[str, Any] = {
            "completion": completion,
            "example": _protected(example) if "example" in wanted else None,
            "model": reward.model,
        }
        if "steps" in wanted:
            supplied["steps"] = list(given.steps_of(reward)[s])
        value = _run(reward, {name: supplied[name] for name in wanted}, _where(completion))
        if "steps" in wanted:
            by_step.append(_checked_steps(reward, value, completion, len(supplied["steps"])))
        else:
            values.append(_checked(reward, value, completion))
    return ByStep(by_step) if "steps" in wanted else values


def _together(reward: BoundReward, wanted: set[str], given: Given) -> list[float | None] | ByStep:
    flat = given.completions
    if not flat:
        return []
    supplied: dict[str, Any] = {
        "completions": list(flat),
        "examples": [_protected(example) for example in given.examples] if "examples" in wanted else None,
        "groups": given.groups,
        "model": reward.model,
    }
    if "all_steps" in wanted:
        supplied["all_steps"] = [list(own) for own in given.steps_of(reward)]
    where = f"for {len(flat)} completions, the first {_clip(flat[0].text)!r}"
    values = _run(reward, {name: supplied[name] for name in wanted}, where)
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"rewards: {reward.name} returned {_kind(values)}; return a list with a number or None for each completion"
        )
    if len(values) != len(flat):
        raise RewardError(
            f"rewards: {reward.name} returned {len(values)} values for {len(flat)} completions; return one for each"
        )
    if "all_steps" in wanted:
        counts = [len(own) for own in supplied["all_steps"]]
        rows = zip(values, flat, counts, strict=True)
        return ByStep([_checked_steps(reward, value, completion, n) for value, completion, n in rows])
    return [_checked(reward, value, completion) for value, completion in zip(values, flat, strict=True)]


def _checked_steps(reward: BoundReward, values: Any, completion: Completion, steps: int) -> list[float]:
    if not isinstance(values, list | tuple) or len(values) != steps:
        raise RewardError(
            f"rewards: {reward.name} returned {_kind(values)} for {steps} steps, {_where(completion)}; "
            "return a list with a number for each step"
        )
    checked = [_checked(reward, value, completion) for value in values]
    if None in checked:
        raise RewardError(f"rewards: {reward.name} returned None for a step, {_where(completion)}; return a number")
    return [float(x) for x in checked if x is not None]


def _protected(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row that a reward cannot change: writing to it fails, writing to what it holds changes a copy."""
    return MappingProxyType(copy.deepcopy(dict(example)))


def _run(reward: BoundReward, supplied: Mapping[str, Any], where: str) -> Any:
    parameters = inspect.signature(reward.function).parameters
    by_position = [n for n, p in parameters.items() if n in supplied and p.kind is p.POSITIONAL_ONLY]
    try:
        return reward.function(
            *[supplied[n] for n in by_position], **{n: v for n, v in supplied.items() if n not in by_position}
        )
    except RlpostError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {frames[1].filename}:{frames[1].lineno}" if len(frames) > 1 else ""
        raise RewardError(
            f"rewards: {reward.name} raised {type(error).__name__}: {_clip(str(error))}{place}, "
            f"{where}; mend the function, or let it return None for what it cannot score"
        ) from error


def _checked(reward: BoundReward, value: Any, completion: Completion) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        raise RewardError(
            f"rewards: {reward.name} returned {_kind(value)}, {_where(completion)}; return a float, or None"
        )
    size: Any = abs(value)
    if not size <= LARGEST:  # false for NaN too
        raise RewardError(
            f"rewards: {reward.name} returned {_clip(repr(value))}, {_where(completion)}; "
            f"return a finite number of at most {LARGEST:g}, or None"
        )
    return float(value)


def _kind(value: object) -> str:
    return f"a {type(value).__name__} ({_clip(repr(value))})"


def _where(completion: Completion) -> str:
    return f"for the completion {_clip(completion.text)!r}"


def _clip(text: str, width: int = 60) -> str:
    text = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * width])
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
