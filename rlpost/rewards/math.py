"""Is the final answer of a completion mathematically the reference answer?

Plain numbers and equal spellings are decided here, exactly: 1,000 is 1000.0, 2/4 is 0.5, and 0.33 is not 1/3.
All else goes to math-verify in a worker process that is killed at its deadline, because computer algebra on
what a model wrote can take for ever, and math-verify's own protection needs SIGALRM and the main thread.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from rlpost.errors import DataError, RecipeError
from rlpost.groups import Completion
from rlpost.recipe.suggest import hint_or_list
from rlpost.rewards.answers import LONGEST, MARKED, find_answer
from rlpost.rewards.math_compare import NeedsAlgebra, same
from rlpost.rewards.math_read import read
from rlpost.rewards.math_text import Unreadable
from rlpost.rewards.workers import Workers


class Verdict(StrEnum):
    """What can be said of an answer."""

    right = "right"
    wrong = "wrong"
    unparseable = "unparseable"
    """No answer was found, or what was found is no mathematics."""
    timeout = "timeout"
    """Undecided at the deadline."""
    error = "error"
    """Undecided: the reference cannot be read, or the comparison crashed or ran out of memory."""


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
    (`answers.find_answer`); `deadline` is in seconds an answer. With `undecided` None, what could not be
    decided is unscored.

    Raises:
        DataError: a row has no reference answer.
        RecipeError: `find` or `deadline` is wrong.
    """
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
        DataError: the row has no such column, or there is nothing in it.
    """
    if column not in example:
        hint = hint_or_list(column, map(str, example), "it has")
        raise DataError(f"math_answer: column: a row has no column {column!r}{hint}")
    value = example[column]
    answer = None if value is None else find_answer(str(value), ("hashes", "boxed", "whole"))
    if answer is None:
        raise DataError(f"math_answer: column: {column!r} is empty in a row; leave such rows out of the data")
    return answer


def _judge(pairs: Sequence[tuple[str, str | None]], deadline: float) -> list[Verdict]:
    if not 0 < deadline <= 3600:
        raise RecipeError(f"math_answer: deadline is {deadline}; give seconds an answer, more than 0, at most 3600")
    decided = {pair: _decide(*pair) for pair in pairs}
    # Completions of a group often agree, and a hanging answer is worth waiting for once only.
    open_pairs = [
        (reference, answer) for (reference, answer), said in decided.items() if said is None and answer is not None
    ]
    if open_pairs:
        replies = _workers().judge(open_pairs, deadline)
        decided.update(zip(open_pairs, map(Verdict, replies), strict=True))
    return [_known(decided[pair]) for pair in pairs]


def _known(said: Verdict | None) -> Verdict:
    assert said is not None
    return said


def _decide(reference: str, answer: str | None) -> Verdict | None:
    """The verdict where rational numbers are all there is to compute, None otherwise."""
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
