"""Sums and products by a tool: the model calls the calculator, reads what it returns, and answers.

The question "What is 47*38?" is to be answered by a call of `calculator` with the expression, and then, when its
result "1786" has come, by "1786". The teacher guesses instead of calling, mistypes the question or the result, or
writes a call that cannot be read, some of the time: imitation alone stays as careless as its teacher.
"""

from __future__ import annotations

import json
import random as randomness
from collections.abc import Mapping
from typing import Any

from rlpost.errors import RecipeError
from rlpost.types import Completion

PROBLEMS = 2 * 90 * 90
"""10+10 to 99+99, and 10*10 to 99*99."""
Row = dict[str, Any]


MISTAKES = (*("guesses",) * 9, "mistypes", "miscopies", "misspells")
"""What a careless teacher does; three times of four he does not call."""


def train(*, held_out: int = 2000, seed: int = 0) -> list[Row]:
    """The problems that `held_out(n=held_out, seed=seed)` does not contain, in random order.

    Raises:
        RecipeError: none would be left.
    """
    if not 0 <= held_out < PROBLEMS:
        raise RecipeError(f"held_out={held_out}: give 0 to {PROBLEMS - 1}, there are {PROBLEMS}")
    return [_row(number) for number in _order(seed)[held_out:]]


def held_out(*, n: int = 2000, seed: int = 0) -> list[Row]:
    """`n` problems, in random order.

    Raises:
        RecipeError: there are not so many.
    """
    if not 1 <= n <= PROBLEMS:
        raise RecipeError(f"n={n}: give 1 to {PROBLEMS}")
    return [_row(number) for number in _order(seed)[:n]]


def careless_teacher(row: Mapping[str, Any], random: randomness.Random, *, errs: float = 0.7) -> Row:
    """A conversation that answers a problem by a call, with a mistake with probability `errs`.

    Raises:
        RecipeError: `errs` is not a probability.
    """
    if not 0 <= errs <= 1:
        raise RecipeError(f"errs={errs}: give a probability, 0 to 1")
    from rlpost.tools.calculator import calculator

    mistake = random.choice(MISTAKES) if random.random() < errs else ""
    asked, answer = row["problem"], row["answer"]
    if mistake == "guesses":
        return _conversation(row, _said(_slip(answer, random)))
    if mistake == "misspells":
        arguments = json.dumps({"expression": asked})
        return _conversation(row, _said(f'<call>{{"name": "calculator", "arguments": {arguments}</call>'))
    expression = _slip(asked, random) if mistake == "mistypes" else asked
    result = calculator(expression)
    concluded = _slip(result, random) if mistake == "miscopies" else result
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": expression}}}
    answered = {"role": "tool", "name": "calculator", "content": result}
    return _conversation(row, {**_said(""), "tool_calls": [call]}, answered, _said(concluded))


def texts() -> list[Row]:
    """What a tokenizer is to know, without numbers, so that a digit is a token."""
    call = '<call>{"name": "calculator", "arguments": {"expression": ""}}</call>'
    lines = ["user: What is", "assistant: ", call, "tool: ", json.dumps(_tools(), ensure_ascii=False)]
    return [{"text": "".join(c for c in line if not c.isdigit())} for line in lines * 20]


def answered(completion: Completion, example: Mapping[str, Any]) -> float:
    """1 for exactly the right number as the last turn, else 0."""
    return float(completion.text.strip() == example["answer"])


def _row(number: int) -> Row:
    a, b, product = number // 2 // 90 + 10, number // 2 % 90 + 10, number % 2
    problem, answer = (f"{a}*{b}", a * b) if product else (f"{a}+{b}", a + b)
    asked = {"role": "user", "content": f"What is {problem}?"}
    return {"prompt": [asked], "problem": problem, "answer": str(answer), "product": bool(product)}


def _conversation(row: Mapping[str, Any], *messages: Row) -> Row:
    return {"messages": [*row["prompt"], *messages], "tools": _tools()}


def _said(content: str) -> Row:
    return {"role": "assistant", "content": content}


def _tools() -> list[Row]:
    """What the model is told of the calculator, as a stage with that tool tells it."""
    from rlpost.tools.calculator import calculator
    from rlpost.usercode.tools import schema

    return [schema(calculator, {})]


def _slip(text: str, random: randomness.Random) -> str:
    """The text with one digit changed."""
    at = random.choice([i for i, sign in enumerate(text) if sign.isdigit()])
    other = random.choice([d for d in "0123456789" if d != text[at]])
    return text[:at] + other + text[at + 1 :]


def _order(seed: int) -> list[int]:
    numbers = list(range(PROBLEMS))
    randomness.Random(seed).shuffle(numbers)
    return numbers
