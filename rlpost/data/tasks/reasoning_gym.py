"""Procedural tasks of the package reasoning_gym, by their names there, with their own verifiers.

`reasoning_gym.products` makes rows of its task `products`: the question as a chat, the answer, and where the problem
comes from. Whether a problem is held out depends on its question alone, so no problem is ever in both parts, whatever
the seeds and sizes of the two.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial as with_arguments
from pathlib import Path
from typing import Any, Literal

from rlpost.data.gym_problems import SIZE, generator
from rlpost.errors import RecipeError, RewardError
from rlpost.types import Completion
from rlpost.usercode.calls import Failed, Remote, describe
from rlpost.usercode.gym import names

HELD_OUT = 5
"""One question in so many is held out."""
PATIENCE = 50
"""Problems looked at for each that is asked for, before there are said to be too few."""
DEADLINE = 10.0
"""Seconds that a verifier may take for one answer; one that takes longer gives 0."""
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PROBLEMS = Path(__file__).parents[1] / "gym_problems.py"


def __getattr__(name: str) -> Any:
    """The function that makes the rows of a task of the package."""
    if name not in names():
        raise AttributeError(name)
    return with_arguments(_rows, name)


def _rows(
    task: str,
    /,
    *,
    part: Literal["train", "held_out"] = "train",
    size: int = 1000,
    seed: int = 0,
    instruction: str = "",
    system: str = "",
    **options: Any,
) -> list[dict[str, Any]]:
    """`size` problems with different questions, as rows `prompt`, `completion`, `answer`, `question`, `problem`.

    Args:
        task: its name.
        part: `held_out` has one question in five, and no other part has them.
        size: number of problems.
        seed: of the problems.
        instruction: follows the question, on a line of its own.
        system: a system turn before it.
        options: of the task, as its configuration in reasoning_gym names them.

    Raises:
        RecipeError: an option is wrong, or there are not so many different questions.
    """
    if size < 1:
        raise RecipeError(f"size={size}: give at least 1")
    start = int.from_bytes(hashlib.sha256(f"{seed}".encode()).digest()[:4]) // 4  # neighbouring seeds share problems
    made, most = generator(task, options, start), min(size * PATIENCE, SIZE)
    rows: list[dict[str, Any]] = []
    for index, entry in _different(made, part == "held_out", most):
        turns = [{"role": "system", "content": system}] * bool(system)
        question = f"{entry['question']}\n{instruction}" if instruction else entry["question"]
        answer = entry["answer"]
        rows.append(
            {
                "prompt": [*turns, {"role": "user", "content": question}],
                **({"completion": answer, "answer": answer} if isinstance(answer, str) else {}),
                "question": entry["question"],
                "problem": {"task": task, "options": options, "seed": start, "index": index},
            }
        )
        if len(rows) == size:
            return rows
    raise RecipeError(
        f"size={size}: only {len(rows)} different questions in part {part} of {most} problems - "
        f"give at most {len(rows)}, or options with more problems"
    )


def _different(made: Any, held_out: bool, most: int) -> Iterator[tuple[int, Any]]:
    """Problems of one part with their indices, each question once."""
    seen: set[str] = set()
    for index in range(most):
        entry = made[index]
        question = entry["question"]
        digest = hashlib.sha256(question.encode()).digest()
        if question not in seen and (int.from_bytes(digest[:4]) % HELD_OUT == 0) is held_out:
            seen.add(question)
            yield index, entry


def score_answer(
    completions: Sequence[Completion],
    examples: Sequence[Mapping[str, Any]],
    *,
    find: Literal["text", "number", "tag"] = "text",
    partial: bool = True,
) -> list[float]:
    """What the task's own verifier gives each answer, 1 for a right one; 0 where it fails.

    Args:
        completions: [S] of rows that a task of reasoning_gym made.
        examples: [S] their rows.
        find: the answer in the completion: all its text, its last number, or what is last between `<answer>` and
            `</answer>`.
        partial: also what it gives answers that are partly right; else 1 or 0.

    Raises:
        RewardError: a row is of another task, or the verifier failed at every one of several answers.
    """
    calls = []
    for completion, example in zip(completions, examples, strict=True):
        if "problem" not in example:
            raise RewardError("reasoning_gym.score_answer: a row has no 'problem': it scores rows of its own tasks")
        calls.append({"answer": _answer(completion.text, find), "problem": example["problem"]})
    digest = hashlib.sha256(_PROBLEMS.read_bytes()).hexdigest()
    described = describe(_PROBLEMS, digest, DEADLINE * 12)["score"]
    verifier = Remote(_PROBLEMS, digest, "score", {"partial": partial}, described, DEADLINE)
    found = verifier.each(calls, keep_going=True)
    failed = [value for value in found if isinstance(value, Failed)]
    if len(failed) == len(found) > 1:
        raise RewardError(f"reasoning_gym.score_answer: the verifier {failed[0].reason}, and failed at all others")
    return [0.0 if isinstance(value, Failed) else float(value) for value in found]


def _answer(text: str, find: str) -> str:
    """The answer in a text; empty where there is none."""
    if find == "text":
        return text.strip()
    found = (_NUMBER if find == "number" else _TAG).findall(text)
    return found[-1].replace(",", "").strip() if find == "number" and found else found[-1].strip() if found else ""
