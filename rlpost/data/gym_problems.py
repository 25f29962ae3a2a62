"""Problems of the package reasoning_gym and their verifiers.

It is also run as a file of its own, in another process: some of the package's verifiers evaluate what a model wrote as
an expression, and some take long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from rlpost.errors import RecipeError
from rlpost.suggest import hint_or_list

SIZE = 100_000
"""Size of every data set, of which as many problems are made as are asked for, with few exceptions."""
_OWN = ("seed", "size")
"""What a data set takes that is no property of its problems."""


def generator(task: str, options: Mapping[str, Any], seed: int) -> Any:
    """The data set of a task: `generator[i]` is its i-th problem, with `question`, `answer` and `metadata`.

    Raises:
        RecipeError: there is no such task, or it does not take these options.
    """
    import reasoning_gym  # here: it takes a second, and is optional
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise RecipeError(f"no task {task!r} in reasoning_gym{hint_or_list(task, DATASETS, 'there are')}")
    known = [field.name for field in fields(DATASETS[task][1]) if field.name not in _OWN]
    for option in options:
        if option not in known:
            raise RecipeError(f"{task!r} has no option {option!r}{hint_or_list(option, known, 'it has')}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=SIZE, **options)
    except (AssertionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{task!r} does not take {json.dumps(dict(options), default=str)}: {reason}") from error


def score(answer: str, problem: Mapping[str, Any], *, partial: bool = True) -> float:
    """What the task's verifier gives an answer; without `partial` 1 where that is 1, else 0."""
    made, entry = _entry(problem["task"], json.dumps(dict(problem["options"])), problem["seed"], problem["index"])
    found = float(made.score_answer(answer, entry))
    return found if partial else float(found >= 1)


@lru_cache(maxsize=4096)
def _entry(task: str, options: str, seed: int, index: int) -> tuple[Any, Any]:
    made = _generator(task, options, seed)
    return made, made[index]


@lru_cache(maxsize=64)
def _generator(task: str, options: str, seed: int) -> Any:
    return generator(task, json.loads(options), seed)
