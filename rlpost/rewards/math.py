"""Whether a completion's final answer equals the reference answer, mathematically.

Both are parsed into values (`math_read`) and compared (`math_compare`). Rational values are compared here, exactly;
harder comparisons run in a worker process that is killed at its deadline.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlpost.errors import DataError, RecipeError
from rlpost.rewards.answers import LONGEST, MARKED, find_answer
from rlpost.rewards.math_compare import NeedsAlgebra, same
from rlpost.rewards.math_read import read
from rlpost.rewards.math_text import Unreadable
from rlpost.rewards.math_values import Value
from rlpost.rewards.workers import Workers
from rlpost.suggest import hint_or_list
from rlpost.types import Completion


class Verdict(StrEnum):
    """The result of comparing an answer."""

    right = "right"
    wrong = "wrong"
    unparseable = "unparseable"
    """No answer was found, or it cannot be parsed, or can be read in two ways."""
    timeout = "timeout"
    """Undecided at the deadline."""
    error = "error"
    """Undecided: the reference cannot be read, the numbers are too large, or the comparison ran out of memory."""


def math_answer(
    completions: Sequence[Completion],
    examples: Sequence[Mapping[str, Any]],
    *,
    column: str = "answer",
    find: str | Sequence[str] = MARKED,
    deadline: float = 5.0,
    undecided: float | None = None,
) -> list[float | None]:
    """1.0 for a right final answer, 0.0 for a wrong or unparseable one, `undecided` for timeouts and errors.

    `column` holds the reference answer; `find` says how the completion's answer is found
    (`answers.find_answer`); `deadline` is in seconds an answer. With `undecided` None, an undecided answer is
    unscored.

    Raises:
        DataError: a row has no reference answer, or one that cannot be read.
        RecipeError: `find` or `deadline` is wrong.
    """
    for example in examples:
        read_reference(example, column)
    scores = {Verdict.right: 1.0, Verdict.wrong: 0.0, Verdict.unparseable: 0.0}
    found = verdicts(completions, examples, column=column, find=find, deadline=deadline)
    return [scores.get(verdict, undecided) for verdict in found]


def verdicts(
    completions: Sequence[Completion],
    examples: Sequence[Mapping[str, Any]],
    *,
    column: str = "answer",
    find: str | Sequence[str] = MARKED,
    deadline: float = 5.0,
) -> list[Verdict]:
    """The verdict on each completion; arguments and errors as in `math_answer`."""
    references = [reference_answer(example, column) for example in examples]
    answers = [find_answer(completion.text, find) for completion in completions]
    return _judge(list(zip(references, answers, strict=True)), deadline)


def verdict(text: str, reference: str, *, find: str | Sequence[str] = MARKED, deadline: float = 5.0) -> Verdict:
    """The verdict on one text; arguments and errors as in `math_answer`."""
    return _judge([(reference_answer({"answer": reference}, "answer"), find_answer(text, find))], deadline)[0]


def reference_answer(example: Mapping[str, Any], column: str) -> str:
    """The reference answer of a row: after ####, in \\boxed{}, or else the whole column.

    Raises:
        DataError: the row has no such column, or it is empty.
    """
    if column not in example:
        hint = hint_or_list(column, map(str, example), "it has")
        raise DataError(f"math_answer: column: a row has no column {column!r}{hint}")
    value = example[column]
    answer = None if value is None else find_answer(str(value), ("hashes", "boxed", "whole"))
    if answer is None:
        raise DataError(f"math_answer: column: {column!r} is empty in a row; leave such rows out of the data")
    return answer


def read_reference(example: Mapping[str, Any], column: str = "answer") -> Value:
    """The value of a row's reference answer.

    Raises:
        DataError: there is none, it cannot be read, or it can be read in two ways.
    """
    reference = reference_answer(example, column)
    try:
        if len(reference) > LONGEST:
            raise Unreadable(f"it is longer than {LONGEST} characters")
        return read(reference)
    except Unreadable as error:
        shown = reference if len(reference) <= 60 else f"{reference[:59]}…"
        raise DataError(
            f"math_answer: the reference answer {shown!r} cannot be read: {error}; "
            "write it in another way, or leave such rows out with a `map`"
        ) from error


class References:
    """Reads what a reward needs of one column of many rows, before anything is trained; `read` raises DataError."""

    def __init__(self, column: str, read: Callable[[Mapping[str, Any], str], object] = read_reference) -> None:
        self._column = column
        self._read = read
        self._rows = 0
        self._wrong: list[tuple[str, DataError]] = []

    def read(self, examples: Sequence[Mapping[str, Any]], locations: Sequence[str]) -> None:
        """Read it in some rows; `locations` are for messages."""
        self._rows += len(examples)
        for example, location in zip(examples, locations, strict=True):
            try:
                self._read(example, self._column)
            except DataError as error:
                self._wrong.append((location, error))

    def refuse(self) -> None:
        """Raise if one could not be read.

        Raises:
            DataError: that of the first such row, with the number of others.
        """
        if self._wrong:
            location, first = self._wrong[0]
            others = f" (and {len(self._wrong) - 1} more of {self._rows} rows)" if len(self._wrong) > 1 else ""
            raise DataError(f"{location}: {first}{others}") from first


def _judge(pairs: Sequence[tuple[str, str | None]], deadline: float) -> list[Verdict]:
    if not 0 < deadline <= 3600:
        raise RecipeError(f"math_answer: deadline is {deadline}; give seconds an answer, more than 0, at most 3600")
    decided = {pair: _decide(*pair) for pair in pairs}
    # Completions of a group often agree: each pair is compared once.
    open_pairs = [
        (reference, answer) for (reference, answer), known in decided.items() if known is None and answer is not None
    ]
    if open_pairs:
        replies = _workers().judge(open_pairs, deadline)
        decided.update(zip(open_pairs, map(Verdict, replies), strict=True))
    return [_known(decided[pair]) for pair in pairs]


def _known(found: Verdict | None) -> Verdict:
    assert found is not None
    return found


def _decide(reference: str, answer: str | None) -> Verdict | None:
    """The verdict if rational numbers suffice to compute it, else None."""
    if len(reference) > LONGEST:
        return Verdict.error
    try:
        right = read(reference)
    except Unreadable:
        return Verdict.error
    if answer is None or len(answer) > LONGEST:
        return Verdict.unparseable
    try:
        return Verdict.right if same(right, read(answer)) else Verdict.wrong
    except Unreadable:
        return Verdict.unparseable
    except NeedsAlgebra:
        return None


_pool: tuple[int, Workers] | None = None


def _workers() -> Workers:
    """The pool of this process; a fork makes its own, since pipes cannot be shared."""
    global _pool
    if _pool is None or _pool[0] != os.getpid():
        _pool = os.getpid(), Workers(Path(__file__).with_name("math_worker.py"))
        atexit.register(_pool[1].close)
    return _pool[1]
