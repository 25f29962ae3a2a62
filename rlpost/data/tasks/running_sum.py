"""A running sum modulo 5 in six turns: an early mistake costs all turns after it.

The prompt "4+3=" is to be answered "2;", what is left of the sum after division by 5. The environment goes on "+3=", to
be answered "0;", and so on. A turn is rewarded where its answer is right for the sum of all digits so far, whatever was
answered before: one who adds to a wrong answer stays wrong. The rewards of an episode add up to the share of turns that
are right. Turns end at ";" (a stop string). The teacher adds to its own answers, and slips some of the time.
"""

from __future__ import annotations

import random as randomness
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from rlpost.errors import RecipeError

TURNS = 6
BASE = 5
ROWS = 10_000
"""Of 5⁷."""


def train(*, held_out: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """The rows that `held_out(n=held_out, seed=seed)` does not contain.

    Raises:
        RecipeError: none would be left.
    """
    if not 0 <= held_out < ROWS:
        raise RecipeError(f"held_out={held_out}: give 0 to {ROWS - 1}, there are {ROWS}")
    return _rows(seed)[held_out:]


def held_out(*, n: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows of digits.

    Raises:
        RecipeError: there are not so many.
    """
    if not 1 <= n <= ROWS:
        raise RecipeError(f"n={n}: give 1 to {ROWS}")
    return _rows(seed)[:n]


def careless_teacher(row: Mapping[str, Any], random: randomness.Random, *, errs: float = 0.3) -> dict[str, Any]:
    """A whole episode as one completion, the environment's part in it; an answer is a slip with probability `errs`.

    Raises:
        RecipeError: `errs` is not a probability.
    """
    if not 0 <= errs <= 1:
        raise RecipeError(f"errs={errs}: give a probability, 0 to 1")
    text, total = "", int(row["digits"][0])
    for digit in row["digits"][1:]:
        total = (total + int(digit)) % BASE
        if random.random() < errs:
            total = (total + random.randrange(1, BASE)) % BASE
        text += f"+{digit}={total};"
    return {**row, "completion": text.removeprefix(f"+{row['digits'][1]}=")}


class RunningSum:
    """The environment: the next digit after every answer, until there is none."""

    def __init__(self) -> None:
        self._digits: list[int] = []
        self._turn = 0

    def reset(self, example: Mapping[str, Any]) -> None:
        """Begin with the row's own prompt."""
        self._digits = [int(digit) for digit in example["digits"]]
        self._turn = 0

    def step(self, action: str) -> tuple[str | None, float, bool, bool, dict[str, Any]]:
        """The next digit, and a sixth for the right sum so far."""
        self._turn += 1
        sums = [total % BASE for total in accumulate(self._digits)]
        reward = (action == str(sums[self._turn])) / TURNS
        if self._turn == TURNS:
            return None, reward, True, False, {}
        return f"+{self._digits[self._turn + 1]}=", reward, False, False, {}


def _rows(seed: int) -> list[dict[str, Any]]:
    numbers = randomness.Random(seed).sample(range(BASE ** (TURNS + 1)), ROWS)
    return [_row("".join(str(number // BASE**k % BASE) for k in range(TURNS + 1))) for number in numbers]


def _row(digits: str) -> dict[str, Any]:
    return {"prompt": f"{digits[0]}+{digits[1]}=", "digits": digits}
