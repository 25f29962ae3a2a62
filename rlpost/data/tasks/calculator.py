"""Addition with a calculator, in two turns: the model asks, the tool answers, the model concludes.

The prompt "47+38?" is to be answered "47+38=", which the calculator completes with "085;", and then the model
concludes "085". Turns end at "=" (a stop string) and with the end token. The teacher asks for the wrong sum, or
copies a digit wrong, some of the time: imitation alone stays as careless as its teacher.
"""

from __future__ import annotations

import random as randomness
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.errors import RecipeError
from rlpost.types import Completion

PROBLEMS = 10_000
"""00+00 to 99+99."""


def train(*, held_out: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """The problems that `held_out(n=held_out, seed=seed)` does not contain, in random order.

    Raises:
        RecipeError: none would be left.
    """
    if not 0 <= held_out < PROBLEMS:
        raise RecipeError(f"held_out={held_out}: give 0 to {PROBLEMS - 1}, there are {PROBLEMS}")
    return [_row(number) for number in _order(seed)[held_out:]]


def held_out(*, n: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """`n` problems, in random order.

    Raises:
        RecipeError: there are not so many.
    """
    if not 1 <= n <= PROBLEMS:
        raise RecipeError(f"n={n}: give 1 to {PROBLEMS}")
    return [_row(number) for number in _order(seed)[:n]]


def careless_teacher(row: Mapping[str, Any], random: randomness.Random, *, errs: float = 0.3) -> dict[str, Any]:
    """One of the two turns as prompt and completion, wrong in a digit with probability `errs`.

    Raises:
        RecipeError: `errs` is not a probability.
    """
    if not 0 <= errs <= 1:
        raise RecipeError(f"errs={errs}: give a probability, 0 to 1")
    question = row["prompt"].replace("?", "=")
    wrong = random.random() < errs
    if random.random() < 0.5:
        return {**row, "completion": _slip(question, random) if wrong else question}
    prompt = row["prompt"] + question + str(reply(question))
    return {**row, "prompt": prompt, "completion": _slip(row["answer"], random) if wrong else row["answer"]}


def reply(text: str, turns: Sequence[str] = ("",)) -> str | None:
    """The calculator: the sum to a question like "47+38", "???" to what is none; after that, the episode is over."""
    if len(turns) > 1:
        return None
    match = re.fullmatch(r"(\d\d)\+(\d\d)=?", text)
    return f"{int(match[1]) + int(match[2]):03d};" if match else "???;"


def concluded(completion: Completion, example: Mapping[str, Any]) -> float:
    """1 for exactly the right digits as the last turn, else 0."""
    return float(completion.text == example["answer"])


def _row(number: int) -> dict[str, Any]:
    a, b = divmod(number, 100)
    return {"prompt": f"{a:02d}+{b:02d}?", "answer": f"{a + b:03d}"}


def _slip(text: str, random: randomness.Random) -> str:
    """The text with one digit changed."""
    at = random.choice([i for i, sign in enumerate(text) if sign.isdigit()])
    other = random.choice([d for d in "0123456789" if d != text[at]])
    return text[:at] + other + text[at + 1 :]


def _order(seed: int) -> list[int]:
    numbers = list(range(PROBLEMS))
    randomness.Random(seed).shuffle(numbers)
    return numbers
