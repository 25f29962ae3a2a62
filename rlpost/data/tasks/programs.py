"""Small programs from a line of words, with tests: where careless programmers go wrong, and how to tell.

The prompt "f(a,b): a plus b, times 4" is to be answered "def f(a,b): return (a+b)*4". There are four kinds:
arithmetic, where a careless programmer forgets the brackets; sums over a range and letters of a word, where one is off
by one; and choices, where one takes > for at least. The prompt shows none of the tests of a row, and some of them tell
the careless program from the right one.
"""

from __future__ import annotations

import itertools
import operator
import random as randomness
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from rlpost.errors import RecipeError

KINDS = ("arithmetic", "sums", "choices", "letters")
"""Each is a column of the rows, true in those of the kind."""
TESTS = 12
"""Of a row, all in one run."""
TELLING = 4
"""Of them, at least so many fail the careless program."""
_DIGITS = range(2, 10)
_Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class _Problem:
    """A function in words, and the right and the careless expression for it."""

    kind: str
    parameters: str
    words: str
    right: str
    careless: str
    value: Callable[[_Arguments, bool], Any]
    """What the right expression is for the arguments; with True, the careless one."""


def train(*, held_out: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """The problems that `held_out(n=held_out, seed=seed)` does not contain, in random order.

    A row has prompt, tests, the `right` program and the `careless` one, and its kind.

    Raises:
        RecipeError: none would be left.
    """
    most = len(_problems())
    if not 0 <= held_out < most:
        raise RecipeError(f"held_out={held_out}: give 0 to {most - 1}, there are {most}")
    return [_row(problem, seed) for problem in _order(seed)[held_out:]]


def held_out(*, n: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """`n` problems, in random order.

    Raises:
        RecipeError: there are not so many.
    """
    most = len(_problems())
    if not 1 <= n <= most:
        raise RecipeError(f"n={n}: give 1 to {most}")
    return [_row(problem, seed) for problem in _order(seed)[:n]]


def careless_teacher(row: Mapping[str, Any], random: randomness.Random, *, errs: float = 0.75) -> dict[str, Any]:
    """The row with the careless program as completion, with probability `errs`; else with the right one.

    Raises:
        RecipeError: `errs` is not a probability.
    """
    if not 0 <= errs <= 1:
        raise RecipeError(f"errs={errs}: give a probability, 0 to 1")
    return {**row, "completion": row["careless" if random.random() < errs else "right"]}


@cache
def _problems() -> tuple[_Problem, ...]:
    return (*_arithmetic(), *_sums(), *_choices(), *_letters())


def _order(seed: int) -> list[_Problem]:
    problems = list(_problems())
    randomness.Random(seed).shuffle(problems)
    return problems


def _row(problem: _Problem, seed: int) -> dict[str, Any]:
    """The problem with tests drawn for it alone: the same for the same words, whatever is held out."""
    random = randomness.Random(f"{seed} {problem.words}")
    cases = _cases(problem, random)
    head = f"f({problem.parameters})"
    return {
        "prompt": f"{head}: {problem.words}\n",
        "right": f"def {head}: return {problem.right}",
        "careless": f"def {head}: return {problem.careless}",
        "tests": [f"assert {_call(case)} == {problem.value(case, False)!r}" for case in cases],
        **{kind: kind == problem.kind for kind in KINDS},
    }


def _cases(problem: _Problem, random: randomness.Random) -> list[_Arguments]:
    """The arguments of the tests; all differ."""
    found: list[_Arguments] = []
    telling = 0
    while len(found) < TESTS:
        case = _arguments(problem.parameters, random)
        tells = problem.value(case, False) != problem.value(case, True)
        if case not in found and (tells or TESTS - len(found) > TELLING - telling):
            found.append(case)
            telling += tells
    return found


def _arguments(parameters: str, random: randomness.Random) -> _Arguments:
    if parameters == "s":
        return {"s": "".join(random.choices(string.ascii_lowercase, k=random.randint(9, 11)))}
    return {name: random.randint(1, random.choice((10, 20))) for name in parameters.split(",")}


def _call(case: _Arguments) -> str:
    return f"f({','.join(map(repr, case.values()))})"


def _of(operand: str, case: _Arguments) -> int:
    """What an operand is, a parameter or a number."""
    return int(case[operand]) if operand in case else int(operand)


def _arithmetic() -> Iterator[_Problem]:
    """Two operations, the first of which needs brackets."""
    firsts = (("plus", "+", operator.add), ("minus", "-", operator.sub))
    seconds = (("times", "*", operator.mul), ("over", "//", operator.floordiv), ("modulo", "%", operator.mod))
    operands = [order for digit in _DIGITS for order in itertools.permutations(("a", "b", str(digit)))]
    for (word, sign, first), (next_word, next_sign, second), (x, y, z) in itertools.product(firsts, seconds, operands):
        words, bare = f"{x} {word} {y}, {next_word} {z}", f"{x}{sign}{y}{next_sign}{z}"
        value = partial(_of_arithmetic, first=first, second=second, operands=(x, y, z))
        yield _Problem("arithmetic", "a,b", words, f"({x}{sign}{y}){next_sign}{z}", bare, value)


def _of_arithmetic(case: _Arguments, careless: bool, *, first: Any, second: Any, operands: tuple[str, ...]) -> int:
    x, y, z = (_of(operand, case) for operand in operands)
    return int(first(x, second(y, z)) if careless else second(first(x, y), z))


def _sums() -> Iterator[_Problem]:
    """Sums over a range that includes its end."""
    bounds = [("a", "b"), ("b", "a"), *itertools.product(map(str, _DIGITS), "ab")]
    for low, high in bounds:
        right, careless = f"range({low},{high}+1)", f"range({low},{high})"
        value = partial(_of_sum, low=low, high=high)
        yield _Problem("sums", "a,b", f"sum of {low} to {high}", f"sum({right})", f"sum({careless})", value)
        head, words = "sum(i*i for i in ", f"sum of squares, {low} to {high}"
        value = partial(_of_sum, low=low, high=high, power=2)
        yield _Problem(
            "sums", "a,b", f"sum of squares, {low} to {high}", f"{head}{right})", f"{head}{careless})", value
        )
        for k in _DIGITS:
            head, tail = "sum(i for i in ", f" if i%{k}==0)"
            value = partial(_of_sum, low=low, high=high, step=k)
            words = f"sum of multiples of {k}, {low} to {high}"
            yield _Problem("sums", "a,b", words, f"{head}{right}{tail}", f"{head}{careless}{tail}", value)


def _of_sum(case: _Arguments, careless: bool, *, low: str, high: str, power: int = 1, step: int = 1) -> int:
    numbers = range(_of(low, case), _of(high, case) + (not careless))
    return sum(number**power for number in numbers if number % step == 0)


def _choices() -> Iterator[_Problem]:
    """One value or another, as a number is at least or at most another."""
    signs = (("least", ">", operator.ge, operator.gt), ("most", "<", operator.le, operator.lt))
    for (word, sign, holds, strictly), (x, other), z in itertools.product(signs, ("ab", "ba"), ("", *_DIGITS)):
        limit = str(z) or other
        for taken, left in itertools.product("ab", ("a", "b", "0", "1")):
            if taken == left or {taken, left} == {x, limit}:
                continue  # the same at the limit, however careless
            words = f"{taken} if {x} is at {word} {limit}, else {left}"
            value = partial(_of_choice, compared=(x, limit), values=(taken, left), holds=(holds, strictly))
            right, careless = (f"{taken} if {x}{s}{limit} else {left}" for s in (f"{sign}=", sign))
            yield _Problem("choices", "a,b", words, right, careless, value)


def _of_choice(
    case: _Arguments, careless: bool, *, compared: tuple[str, str], values: tuple[str, str], holds: tuple[Any, Any]
) -> int:
    x, limit = (_of(operand, case) for operand in compared)
    return _of(values[not holds[careless](x, limit)], case)


def _letters() -> Iterator[_Problem]:
    """Parts of a word, whose letters are counted from 1."""
    for first, last in itertools.combinations(range(1, 10), 2):
        part = f"letters {first} to {last} of s"
        right, careless = f"s[{first - 1}:{last}]", f"s[{first}:{last}]"
        for words, tail, change in (
            (part, "", str),
            (f"{part} in capitals", ".upper()", str.upper),
            (f"{part} backwards", "[::-1]", _backwards),
        ):
            value = partial(_of_letters, first=first, last=last, change=change)
            yield _Problem("letters", "s", words, f"{right}{tail}", f"{careless}{tail}", value)


def _of_letters(case: _Arguments, careless: bool, *, first: int, last: int, change: Callable[[str], str]) -> str:
    return change(str(case["s"])[first - (not careless) : last])


def _backwards(text: str) -> str:
    return text[::-1]
