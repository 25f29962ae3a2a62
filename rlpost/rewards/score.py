"""Rewards of groups: every reward function on every completion, and their weighted sum."""

from __future__ import annotations

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

from rlpost.errors import RecipeError, RewardError, RlpostError
from rlpost.groups import Completion, Group, completions

LARGEST = 1e12
"""Largest size of a reward: squares of larger ones, summed over a group, leave float32."""

Nested = list[list[float | None]]
"""[P][G] one number a completion, None where it is unscored."""


@dataclass(frozen=True)
class BoundReward:
    """A reward function ready to be called."""

    name: str
    """What it is logged under."""
    weight: float
    """Its weight in the sum."""
    function: Callable[..., Any]
    """The function with its arguments applied: `completion(s)` and `example(s)` remain."""


@dataclass(frozen=True)
class Scores:
    """Rewards of P groups of G completions (groups may differ in size).

    Example: one prompt with two completions, rewards right (weight 1) and brief (weight 0.5):
    ``Scores(total=[[1.5, None]], by_name={"right": [[1.0, None]], "brief": [[1.0, 0.0]]})``.
    """

    total: Nested
    """[P][G] weighted sums; None where any reward with a weight other than 0 is None."""
    by_name: dict[str, Nested]
    """[P][G] each reward, without its weight."""

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


class Scorer:
    """Calls reward functions and checks what they return. An error in one stops the run, by its name.

    Raises:
        RecipeError: no rewards, two of one name, or a function that does not take what it is given.
    """

    def __init__(self, rewards: Sequence[BoundReward]) -> None:
        if not rewards:
            raise RecipeError("rewards: there are none; add one, such as {fn: math_answer}")
        self.rewards = list(rewards)
        names = [reward.name for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"rewards: two are called {name!r}; give one of them another `name`")
        self._calls = [_call(reward) for reward in self.rewards]

    def score(self, groups: Sequence[Group]) -> Scores:
        """Reward every completion of every group.

        Raises:
            RewardError: a reward raised, or returned something that is not a finite number or None.
        """
        flat = completions(groups)
        examples = [group.example for group in groups for _ in group.completions]
        values = [call(flat, examples) for call in self._calls]
        sums = [_weighted_sum(self.rewards, column) for column in zip(*values, strict=True)]
        named = {reward.name: _nest(v, groups) for reward, v in zip(self.rewards, values, strict=True)}
        return Scores(total=_nest(sums, groups), by_name=named)


def _weighted_sum(rewards: Sequence[BoundReward], values: Sequence[float | None]) -> float | None:
    total = 0.0
    for reward, value in zip(rewards, values, strict=True):
        if reward.weight != 0:
            if value is None:
                return None
            total += reward.weight * value
    return total


def _nest(flat: Sequence[float | None], groups: Sequence[Group]) -> Nested:
    values = iter(flat)
    return [[next(values) for _ in group.completions] for group in groups]


_Call = Callable[[Sequence[Completion], Sequence[Mapping[str, Any]]], list[float | None]]


def _call(reward: BoundReward) -> _Call:
    """A reward as a function of all completions, whether it takes them one by one or together."""
    names = set(inspect.signature(reward.function).parameters)
    if {"completions", "examples"} & names:
        wanted, each = ("completions", "examples"), _together
    else:
        wanted, each = ("completion", "example"), _one_by_one
    if wanted[0] not in names or ({"completion", "example"} & names and each is _together):
        raise RecipeError(
            f"rewards: {reward.name} takes ({', '.join(sorted(names))}); "
            "a reward takes `completion` and `example`, or `completions` and `examples`"
        )
    return partial(each, reward, [name for name in wanted if name in names])


def _one_by_one(
    reward: BoundReward, wanted: list[str], flat: Sequence[Completion], examples: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    values = []
    for completion, example in zip(flat, examples, strict=True):
        supplied = {"completion": completion, "example": _protected(example)}
        value = _run(reward, {name: supplied[name] for name in wanted}, _where(completion))
        values.append(_checked(reward, value, completion))
    return values


def _together(
    reward: BoundReward, wanted: list[str], flat: Sequence[Completion], examples: Sequence[Mapping[str, Any]]
) -> list[float | None]:
    if not flat:
        return []
    supplied = {"completions": list(flat), "examples": [_protected(example) for example in examples]}
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
    return [_checked(reward, value, completion) for value, completion in zip(values, flat, strict=True)]


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
