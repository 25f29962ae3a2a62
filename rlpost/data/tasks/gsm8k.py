"""Grade-school math (Cobbe et al. 2021, arXiv:2110.14168): maps over the rows of the published files.

Questions come from `question`/`answer` rows (train, test); `example_model_solutions` rows add four models'
solutions to test questions, told right or wrong. Never evaluate on a question whose solutions were trained
on: `kfold: {by: question}` splits them, and `only_without_pairs` gives the questions that no pair came from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlpost.errors import DataError

_FINAL = re.compile(r"####[ \t]*(.+?)\s*$")
_A_LINE = re.compile(r"^A:[ \t]*(.*?)\s*\Z", re.MULTILINE)


def question_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """A `question`/`answer` row as prompt, completion, and the final number as `answer`.

    Raises:
        DataError: a column or the final answer is missing.
    """
    question, solution = _text(row, "question"), _text(row, "answer")
    return {
        "prompt": prompt(question),
        "completion": solution,
        "answer": final_answer(solution),
        "question": question,
    }


def conversation(
    row: Mapping[str, Any],
    *,
    instruction: str = "Reason step by step. End with a line '#### ' and the final number alone.",
) -> dict[str, Any]:
    """A `question`/`answer` row for a chat model: the question and the instruction as one user turn.

    Raises:
        DataError: a column or the final answer is missing.
    """
    made = question_answer(row)
    messages = [{"role": "user", "content": f"{made['question'].strip()}\n\n{instruction}"}]
    return {**made, "prompt": messages}


def solution_pairs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All pairs of a right and a wrong solution of the row's question; none when it lacks either.

    Raises:
        DataError: not a row of example solutions.
    """
    right, wrong = _solutions(row)
    question = _text(row, "question")
    return [
        {"prompt": prompt(question), "chosen": chosen, "rejected": rejected, "question": question}
        for chosen in right
        for rejected in wrong
    ]


def solutions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The distinct solutions of the row's question, the right ones first, with `correct` true or false.

    Raises:
        DataError: not a row of example solutions.
    """
    right, wrong = _solutions(row)
    question = _text(row, "question")
    return [
        {"prompt": prompt(question), "completion": text, "correct": text in right, "question": question}
        for text in [*right, *wrong]
    ]


def only_without_pairs(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """An evaluation row of a question that `solution_pairs` makes nothing of, else None.

    The four models were all right or all wrong on these: their accuracy is not that of the whole test split.

    Raises:
        DataError: not a row of example solutions.
    """
    if solution_pairs(row):
        return None
    return question_answer({"question": row.get("question"), "answer": _hashes(_text(row, "ground_truth"))})


def prompt(question: str) -> str:
    """The prompt of a question; it ends in a newline, where tokenizers part words."""
    return f"Question: {question.strip()}\nAnswer:\n"


def final_answer(solution: str) -> str:
    """The number after the last `####`, without thousands separators and dollar sign.

    Raises:
        DataError: there is none.
    """
    found = _FINAL.search(solution.rstrip())
    if not found:
        raise DataError(f"no final answer after '####' in {solution[-40:]!r}")
    return found.group(1).split("####")[-1].replace(",", "").replace("$", "").strip()


def _solutions(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The distinct right and wrong solutions, with `####` before the final answer."""
    right: dict[str, None] = {}
    wrong: dict[str, None] = {}
    found = [v for v in row.values() if isinstance(v, Mapping) and "is_correct" in v]
    if not found:
        raise DataError("no column holds a solution with 'is_correct': this map reads example_model_solutions rows")
    for entry in found:
        (right if entry["is_correct"] else wrong)[_hashes(_text(entry, "solution"))] = None
    return list(right), list(wrong)


def _hashes(solution: str) -> str:
    """The solution with its last line `A: 18` written `#### 18`, as in the training rows."""
    return _A_LINE.sub(lambda m: f"#### {m.group(1)}", solution.rstrip())


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"no text in column {column!r} (columns: {', '.join(map(str, row))})")
    return value
