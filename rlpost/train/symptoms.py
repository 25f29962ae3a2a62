"""Signs in a stage's metrics that training goes wrong, each with what to try; docs/troubleshooting.md says more.

A symptom is told only when it has lasted for `LASTS` logged steps, so that noise raises none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

from rlpost import console

LASTS = 10
"""Logged steps that a symptom must last; changes are those between two such windows."""
Lines = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Symptom:
    """A sign that something is off."""

    name: str
    """Its heading in docs/troubleshooting.md, as in a link."""
    found: Callable[[Lines, Lines], str | None]
    """(the stage's first `LASTS` lines, its last 2 `LASTS`) -> what is seen; None if it is not there."""
    advice: str

    def text(self, seen: str) -> str:
        """The warning: one line."""
        return f"{seen}; {self.advice} (docs/troubleshooting.md#{self.name})"


def symptoms(first: Lines, last: Lines) -> dict[str, str]:
    """What is off, symptom -> one line with what to try.

    Args:
        first: the stage's first `LASTS` lines of metrics.
        last: its last 2 `LASTS` lines, or as many as there are.
    """
    if len(last) < LASTS:
        return {}
    found = {symptom: symptom.found(first, last) for symptom in SYMPTOMS}
    return {symptom.name: symptom.text(seen) for symptom, seen in found.items() if seen is not None}


@dataclass
class Watch:
    """Warns of each symptom once a stage."""

    title: str
    _first: list[Mapping[str, float]] = field(default_factory=list)
    _last: list[Mapping[str, float]] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    def replay(self, lines: Lines) -> None:
        """Lines logged before the stage was resumed; what they show has been told."""
        for line in lines:
            self._told |= set(self._after(line))

    def see(self, step: int, line: Mapping[str, float]) -> None:
        """Warn of what is new with the line of that step, the first of which is 1."""
        for name, text in self._after(line).items():
            if name not in self._told:
                console.warn(f"{self.title}: step {step}: {text}")
            self._told.add(name)

    def _after(self, line: Mapping[str, float]) -> dict[str, str]:
        if len(self._first) < LASTS:
            self._first.append(line)
        self._last = [*self._last[1 - 2 * LASTS :], line]
        return symptoms(self._first, self._last)


def _values(lines: Lines, name: str) -> list[float]:
    """The metric in every line; empty if a line lacks it."""
    values = [line.get(name) for line in lines]
    return [v for v in values if v is not None] if None not in values else []


def _share_above(name: str, limit: float, what: str) -> Callable[[Lines, Lines], str | None]:
    """A share whose mean is above the limit, and which is so in most of the window's steps."""

    def found(_: Lines, last: Lines) -> str | None:
        values = _values(last[-LASTS:], name)
        if not values or fmean(values) <= limit or sum(v > limit for v in values) < 0.8 * LASTS:
            return None
        return f"{fmean(values):.0%} of {what} in the last {LASTS} logged steps"

    return found


def _solved(last: Lines) -> bool:
    """Whether nearly all is right already: a mean reward from 0.9 to 1. Equal rewards and sure answers are then due."""
    values = _values(last[-LASTS:], "reward")
    return bool(values) and 0.9 <= fmean(values) <= 1


def _zero_signal(first: Lines, last: Lines) -> str | None:
    limit = 0.98 if _solved(last) else 0.8
    return _share_above("zero_signal", limit, "groups have equal rewards, so they teach nothing")(first, last)


def _clipped(first: Lines, last: Lines) -> str | None:
    sides = [{"clipped": line["clipped_low"] + line["clipped_high"]} for line in last if "clipped_high" in line]
    if len(sides) < len(last):
        return None
    return _share_above("clipped", 0.3, "actions have a clipped ratio")(first, sides)


def _entropy(first: Lines, last: Lines) -> str | None:
    before, now = _values(first, "entropy"), _values(last[-LASTS:], "entropy")
    if len(last) < 2 * LASTS or not before or not now or _solved(last) or max(now) >= 0.1 * fmean(before):
        return None
    return f"entropy has fallen from {fmean(before):.3g} to {fmean(now):.3g} nats a token"


def _kl(_: Lines, last: Lines) -> str | None:
    """More than 20 nats a completion, and half as much again as in the first steps of two windows."""
    values = _values(last, "sequence_kl")
    if len(values) < 2 * LASTS:
        return None
    before, now = values[: LASTS // 2], values[LASTS:]
    if min(now) < 20 or fmean(now) < 1.5 * fmean(before):
        return None
    return f"the KL to the reference has grown from {fmean(before):.3g} to {fmean(now):.3g} nats a completion"


def _cancel(_: Lines, last: Lines) -> str | None:
    """One reward rises and another falls, each by 5 standard errors, while the total hardly moves.

    It stays within 1 standard error, or within a tenth of the smaller move.
    """
    if len(last) < 2 * LASTS:
        return None
    names = [name for name in last[-1] if name.startswith("reward/")]
    moves = {name: _move(_values(last, name)) for name in names}
    up = next((name for name, move in moves.items() if move > 5), None)
    down = next((name for name, move in moves.items() if move < -5), None)
    if up is None or down is None:
        return None
    total, smaller = _change(_values(last, "reward")), min(abs(_change(_values(last, name))) for name in (up, down))
    if abs(_move(_values(last, "reward"))) > 1 and abs(total) > 0.1 * smaller:
        return None
    return f"{up} rises as {down} falls, and their sum stays where it is"


def _move(values: Sequence[float]) -> float:
    """The change of the mean from the first window to the second, in standard errors of that change."""
    if len(values) < 2 * LASTS:
        return 0.0
    before, now = values[:LASTS], values[LASTS:]
    error = math.sqrt((variance(before) + variance(now)) / LASTS)
    return _change(values) / error if error else 0.0


def _change(values: Sequence[float]) -> float:
    """The change of the mean from the first window to the second."""
    return fmean(values[LASTS:]) - fmean(values[:LASTS]) if len(values) == 2 * LASTS else 0.0


SYMPTOMS = (
    Symptom(
        "zero-signal",
        _zero_signal,
        "try prompts neither always nor never solved, a larger group_size, or dynamic_sampling_rounds",
    ),
    Symptom(
        "truncated",
        _share_above("truncated", 0.5, "completions are cut off before their end"),
        "raise sampling.max_new_tokens, or teach the end by sft first",
    ),
    Symptom("clipped", _clipped, "lower learning_rate, num_iterations or num_minibatches"),
    Symptom("entropy-collapse", _entropy, "lower learning_rate, raise clip_high or entropy_coef, or stop here"),
    Symptom("rewards-that-cancel", _cancel, "change the weights of the rewards"),
    Symptom("kl-running-away", _kl, "raise kl.beta or lower learning_rate, and read the last samples"),
)
"""All that are looked for."""
