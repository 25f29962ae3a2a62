"""Two-digit addition, written backwards: data, a teacher who forgets the carry, reward and evaluation column.

"47+38=" is answered "580": three digits, units first, so that a carry moves in the direction of writing.
"""

from __future__ import annotations

import random as randomness
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlpost.errors import RecipeError
from rlpost.types import Completion

PROBLEMS = 10_000
"""00+00 to 99+99."""


def train(*, held_out: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """The problems that `held_out(n=held_out, seed=seed)` does not contain, in random order.

    A problem and its mirror image (47+38 and 38+47) are two problems: one may be held out and the other not.

    Raises:
        RecipeError: none or less would be left.
    """
    if not 0 <= held_out < PROBLEMS:
        raise RecipeError(f"held_out={held_out}: give 0 to {PROBLEMS - 1}, there are {PROBLEMS}")
    return [dict(row) for row in _rows(seed)[held_out:]]


def held_out(*, n: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """`n` problems, in random order.

    Raises:
        RecipeError: there are not so many.
    """
    if not 1 <= n <= PROBLEMS:
        raise RecipeError(f"n={n}: give 1 to {PROBLEMS}")
    return [dict(row) for row in _rows(seed)[:n]]


def labelled(*, forbidden: Sequence[str], held_out: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """The rows of `train` with `label`: false where the right answer ends in a forbidden ending.

    Raises:
        RecipeError: no ending is given, one is empty, or no problem is left.
    """
    if isinstance(forbidden, str) or not forbidden or not all(forbidden):
        raise RecipeError(f"forbidden={forbidden!r}: give a list of endings, like ['80', '31'], and no empty one")
    rows = train(held_out=held_out, seed=seed)
    return [{**row, "label": not row["answer"].endswith(tuple(forbidden))} for row in rows]


def careless_teacher(row: Mapping[str, Any], random: randomness.Random, *, forgets: float = 0.6) -> dict[str, Any]:
    """The row with an answer drawn afresh: with probability `forgets` the carry from the units is dropped.

    Without a carry there is nothing to forget, and the answer is right.

    Raises:
        RecipeError: `forgets` is not a probability.
    """
    if not 0 <= forgets <= 1:
        raise RecipeError(f"forgets={forgets}: give a probability, 0 to 1")
    a, b = int(row["prompt"][:2]), int(row["prompt"][3:5])
    forgotten = random.random() < forgets
    return {**row, "completion": _without_carry(a, b) if forgotten else _answer(a, b)}


def correct(completion: Completion, example: Mapping[str, Any]) -> float:
    """1 for exactly the right digits, else 0."""
    return float(completion.text == example["answer"])


def right_digits(completion: Completion, example: Mapping[str, Any]) -> float:
    """The share of digits that are right, each in its place; 0 for an answer of another length."""
    answer = str(example["answer"])
    if len(completion.text) != len(answer):
        return 0.0
    return sum(a == b for a, b in zip(completion.text, answer, strict=True)) / len(answer)


def right_so_far(example: Mapping[str, Any], completion: Completion, steps: Sequence[str]) -> list[float]:  # noqa: ARG001
    """For every step of an answer, 1 while the digits up to its end are the right ones, else 0."""
    found, text = [], ""
    for step in steps:
        text += step
        found.append(float(str(example["answer"]).startswith(text)))
    return found


def steps(*, held_out: int = 2000, seed: int = 0, forgets: float = 0.6) -> list[dict[str, Any]]:
    """Rows `prompt, steps, labels`, as a person would mark a careless pupil: right up to the first wrong digit.

    Raises:
        RecipeError: no problem is left, or `forgets` is not a probability.
    """
    random = randomness.Random(seed)
    rows = [careless_teacher(row, random, forgets=forgets) for row in train(held_out=held_out, seed=seed)]
    return [
        {
            **row,
            "steps": list(row["completion"]),
            "labels": [float(row["answer"].startswith(row["completion"][: i + 1])) for i in range(3)],
        }
        for row in rows
    ]


def _row(number: int) -> dict[str, Any]:
    a, b = divmod(number, 100)
    answer = _answer(a, b)
    return {
        "prompt": f"{a:02d}+{b:02d}=",
        "completion": answer,
        "answer": answer,
        # Ten or more in the units: exactly where the careless teacher goes wrong.
        "carry": answer != _without_carry(a, b),
    }


def _answer(a: int, b: int) -> str:
    return f"{a + b:03d}"[::-1]


def _without_carry(a: int, b: int) -> str:
    """The carry from the units dropped: 47+38 -> units 5, tens 7, hundreds 0. What the tens make is written out."""
    return f"{(a // 10 + b // 10) * 10 + (a + b) % 10:03d}"[::-1]


@lru_cache(maxsize=2)
def _rows(seed: int) -> list[dict[str, Any]]:
    """All problems in random order; stages that read the same ones do not make them again."""
    numbers = list(range(PROBLEMS))
    randomness.Random(seed).shuffle(numbers)
    return [_row(number) for number in numbers]
