"""Calls one reward function for all completions, with the arguments its parameters name, and checks its results."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

from rlpost.errors import RecipeError, RewardError, RlpostError
from rlpost.ranks import divided, from_first
from rlpost.rewards.tree import BoundReward
from rlpost.types import Completion, Group
from rlpost.usercode.calls import CallError, Failed, Remote
from rlpost.usercode.wire import Odd

LARGEST = 1e12
"""Largest magnitude of a reward: squares of larger ones, summed over a group, overflow float32."""


@dataclass(frozen=True)
class Given:
    """Arguments that rewards may ask for."""

    groups: list[Group]
    completions: Sequence[Completion]
    """[S]."""
    examples: Sequence[Mapping[str, Any]]
    """[S] the row of each completion."""
    steps: Sequence[Sequence[str]] | None
    """[S] the texts of each completion's steps."""

    def steps_of(self, reward: BoundReward) -> Sequence[Sequence[str]]:
        """The steps.

        Raises:
            RecipeError: the stage has no `step_end`.
        """
        if self.steps is None:
            raise RecipeError(f"rewards: {reward.name} rewards steps; say what ends one with the stage's `step_end`")
        return self.steps


@dataclass(frozen=True)
class ByStep:
    """Rewards by step."""

    steps: list[list[float]]
    """[S] a number for every step of each completion."""


Call = Callable[[Given], "list[float | None] | ByStep"]
_IMMUTABLE = frozenset((str, int, float, bool, type(None)))
_ONE = {"completion", "example", "steps"}
_ALL = {"completions", "examples", "all_steps", "groups"}


def caller(reward: BoundReward) -> Call:
    """A reward as a function of all completions, whether its function takes one completion or all."""
    parameters = set(inspect.signature(reward.function).parameters)
    one, together = parameters & {"completion", "steps"}, parameters & {"completions", "groups", "all_steps"}
    if bool(one) == bool(together) or (parameters & _ONE and parameters & _ALL):
        raise RecipeError(
            f"rewards: {reward.name} takes ({', '.join(sorted(parameters))}); "
            "a reward takes `completion` and `example`, or `completions` and `examples`"
        )
    names_wanted = parameters & (_ALL | _ONE | {"model"})
    return partial(_together if together else _one_by_one, reward, names_wanted)


def _one_by_one(reward: BoundReward, wanted: set[str], given: Given) -> list[float | None] | ByStep:
    steps = given.steps if "steps" not in wanted else given.steps_of(reward)
    calls = []
    for s, (completion, example) in enumerate(zip(given.completions, given.examples, strict=True)):
        supplied: dict[str, Any] = {"completion": completion, "example": example, "model": reward.model}
        if "steps" in wanted and steps is not None:
            supplied["steps"] = list(steps[s])
        calls.append({name: supplied[name] for name in wanted})
    found = divided(list(enumerate(calls)), [1] * len(calls), partial(_share, reward))
    if "steps" not in wanted:
        return _validated(reward, found, given.completions, partial(_checked, reward), _where)
    counted = [(c, len(call["steps"])) for c, call in zip(given.completions, calls, strict=True)]
    by_step = _validated(
        reward, found, counted, lambda v, one: _checked_steps(reward, v, *one), lambda one: _where(one[0])
    )
    return ByStep([own or [] for own in by_step])


def _together(reward: BoundReward, wanted: set[str], given: Given) -> list[float | None] | ByStep:
    flat = given.completions
    if not flat:
        return []
    supplied: dict[str, Any] = {
        "completions": list(flat),
        "examples": list(given.examples),
        "groups": given.groups,
        "model": reward.model,
    }
    if "all_steps" in wanted:
        supplied["all_steps"] = [list(own) for own in given.steps_of(reward)]
    (found,) = _of_all(reward, {name: supplied[name] for name in wanted})
    steps = supplied.get("all_steps")
    (values,) = _validated(reward, [found], [flat], lambda v, flat: _checked_list(reward, v, flat, steps), _where_all)
    if steps is not None:
        return ByStep(values or [[] for _ in flat])
    return values or [None for _ in flat]


def _share(reward: BoundReward, numbered: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Any]:
    """What some of the calls returned, given with their numbers among all."""
    return _each(reward, [call for _, call in numbered], first=numbered[0][0]) if numbered else []


def _of_all(reward: BoundReward, call: Mapping[str, Any]) -> list[Any]:
    """What the one call of all completions returned: a user's function is called by the first rank alone."""
    if isinstance(reward.function, Remote):
        return from_first(lambda: _each(reward, [call]))
    return _each(reward, [call])


def _each(reward: BoundReward, calls: Sequence[Mapping[str, Any]], first: int = 0) -> list[Any]:
    """What each call returned, or a Failed; ends at the first failure if failures stop the run."""
    if isinstance(reward.function, Remote):
        try:
            return reward.function.each(calls, read_only=True, numbers=True, keep_going=reward.unscored, first=first)
        except CallError as error:
            raise RewardError(f"rewards: {reward.name} cannot be called: {error}") from error
    return list(_each_here(reward.function, calls))


def _each_here(function: Callable[..., Any], calls: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    parameters = inspect.signature(function).parameters
    by_position = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    for call in calls:
        given = {name: _protected(name, value) for name, value in call.items()}
        try:
            yield function(
                *[given[n] for n in by_position if n in given],
                **{n: v for n, v in given.items() if n not in by_position},
            )
        except RlpostError:
            raise
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            location = f" at {frames[1].filename}:{frames[1].lineno}" if len(frames) > 1 else ""
            yield Failed(f"raised {type(error).__name__}: {_clip(str(error))}{location}", error)
            return


def _protected(name: str, value: Any) -> Any:
    """A row that a reward cannot change: read-only, with copies of its values."""
    if name == "example":
        row = dict(value)
        return MappingProxyType(row if all(type(v) in _IMMUTABLE for v in row.values()) else copy.deepcopy(row))
    return [_protected("example", row) for row in value] if name == "examples" else value


def _validated(
    reward: BoundReward,
    found: Sequence[Any],
    about: Sequence[Any],
    check: Callable[[Any, Any], Any],
    where: Callable[[Any], str],
) -> list[Any]:
    """The values, checked; for a failure or an invalid value, None or a RewardError as the recipe says.

    Args:
        reward: returned the values.
        found: a value or a Failed for each of `about`; ends at a Failed that stops the run.
        about: the completion, or completions, of each call.
        check: (value, its `about`) -> the value as numbers; raises RewardError.
        where: `about` in words, for messages.
    """
    values: list[Any] = []
    failures: list[RewardError] = []
    for value, one in zip(found, about, strict=False):
        try:
            if isinstance(value, Failed):
                raise RewardError(
                    f"rewards: {reward.name} {value.reason}, {where(one)}; mend the function, or let it "
                    f"return None for what it cannot score{_remedy(reward, value)}"
                ) from value.error
            values.append(check(value, one))
        except RewardError as error:
            if not reward.unscored:
                raise
            failures.append(error)
            values.append(None)
    if failures:
        times = f"{len(failures)} of {len(values)} calls of it" if len(values) > 1 else "its call"
        reward.failing.begins(f"rewards: {reward.name}: {times} failed and are unscored; the first: {failures[0]}")
    else:
        reward.failing.ends(f"rewards: {reward.name} fails no more")
    return values


def _remedy(reward: BoundReward, failed: Failed) -> str:
    if not isinstance(reward.function, Remote):
        return ""
    slow = ", raise its `deadline`" if failed.reason.startswith("ran for") else ""
    return f"{slow}, or set on_failure: unscored"


def _checked_list(reward: BoundReward, values: Any, flat: Sequence[Completion], all_steps: Any) -> list[Any]:
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"rewards: {reward.name} returned {_kind(values)}; return a list with a number or None for each completion"
        )
    if len(values) != len(flat):
        raise RewardError(
            f"rewards: {reward.name} returned {len(values)} values for {len(flat)} completions; return one for each"
        )
    if all_steps is not None:
        return [_checked_steps(reward, v, c, len(n)) for v, c, n in zip(values, flat, all_steps, strict=True)]
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
    return value.kind if isinstance(value, Odd) else f"a {type(value).__name__} ({_clip(repr(value))})"


def _where(completion: Completion) -> str:
    return f"for the completion {_clip(completion.text)!r}"


def _where_all(flat: Sequence[Completion]) -> str:
    return f"for {len(flat)} completions, the first {_clip(flat[0].text)!r}"


def _clip(text: str, width: int = 60) -> str:
    text = "".join(sign if sign.isprintable() else " " for sign in text[: 4 * width])
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
