"""Whether the program in a completion passes the tests of its row; it runs in a sandbox, and is judged outside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from rlpost.ranks import divided, on_this_machine
from rlpost.rewards.code_tests import Assertion, Printed, Test, read_tests
from rlpost.sandbox.levels import choose
from rlpost.sandbox.outcome import Limits, Reason, limits_of
from rlpost.sandbox.run import run
from rlpost.types import Completion

PYTHON = ("", "py", "python", "python3")
"""What a fenced block of Python is called."""
LONGEST_ANSWER = 1 << 16
"""Characters of the answer to one test, or 16 for each of the test if that is more: a longer one fails it."""
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([\w+-]*)[^`]*")


def code(
    completions: Sequence[Completion],
    examples: Sequence[Mapping[str, Any]],
    *,
    column: str = "tests",
    partial: bool = True,
    deadline: float = 5.0,
    memory: int = 512,
    level: str | None = None,
) -> list[float | None]:
    """The share of the row's tests that a completion's program passes; 1 or 0 with `partial` false.

    The program is the last fenced block of Python, or the whole text. `column` holds a list of assertions as text, or
    of `{input: TEXT, output: TEXT}`. A run may take `deadline` seconds of computing and twice that by the clock; what
    comes after one that took longer counts as failed. `memory` is in MiB; `level` that of the sandbox, by default the
    strongest that holds here.

    Raises:
        DataError: a row has no tests, or one that cannot be used.
        RecipeError: no sandbox holds on this machine, or `deadline` or `memory` is wrong.
        RewardError: the sandbox could not be made.
    """
    limits = limits_of(deadline=deadline, memory=memory)
    held = choose(level)
    jobs = [
        (program_of(completion.text), read_tests(example, column))
        for completion, example in zip(completions, examples, strict=True)
    ]
    different = list(dict.fromkeys(jobs))  # completions of a group often agree

    def passed(some: Sequence[tuple[str, tuple[Test, ...]]]) -> list[float]:
        processors = max(1, len(os.sched_getaffinity(0)) // on_this_machine())
        with ThreadPoolExecutor(processors) as pool:
            return list(pool.map(lambda job: _share(*job, limits=limits, level=held, partial=partial), some))

    costs = [1 if isinstance(tests[0], Assertion) else len(tests) for _, tests in different]
    shares = dict(zip(different, divided(different, costs, passed), strict=True))
    return [shares[job] for job in jobs]


def program_of(text: str) -> str:
    """The last fenced block of Python in a text, up to the end if it is never closed; else the whole text."""
    found = None
    block: list[str] | None = None
    fence = ""
    for line in text.replace("\r\n", "\n").split("\n"):
        mark = _FENCE.fullmatch(line)
        if block is None and mark is not None:
            block, fence = [], mark[1]
            found = block if mark[2].lower() in PYTHON else found
        elif block is not None and mark is not None and mark[1].startswith(fence) and not mark[2]:
            block = None
        elif block is not None:
            block.append(line)
    return text if found is None else "\n".join(found) + "\n"


def _share(program: str, tests: Sequence[Test], *, limits: Limits, level: str, partial: bool) -> float:
    verdicts = _asserted(program, [test for test in tests if isinstance(test, Assertion)], limits, level)
    for test in (test for test in tests if isinstance(test, Printed)):
        outcome = run(program, stdin=test.stdin, limits=limits, level=level)
        verdicts.append(outcome.succeeded and test.passed(outcome.stdout))
        if outcome.reason is Reason.time or not (partial or verdicts[-1]):
            break
    share = sum(verdicts) / len(tests)
    return share if partial else float(share == 1.0)


def _asserted(program: str, tests: Sequence[Assertion], limits: Limits, level: str) -> list[bool]:
    """Which assertions hold; all are asked in one run, each in its turn."""
    if not tests:
        return []
    functions = "".join(test.function(number) for number, test in enumerate(tests))
    job = json.dumps({"program": f"{program}\n{functions}", "tests": len(tests)})
    outcome = run(_driver(), stdin=job, limits=limits, level=level)
    answers: dict[int, list[Any]] = {}
    for line in outcome.stdout.split("\n")[:-1]:
        try:
            number, values = json.loads(line)
            test = tests[number]
        except (ValueError, TypeError, LookupError, RecursionError):
            continue  # the program wrote it
        room = max(LONGEST_ANSWER, 16 * len(test.function(number)))
        answers.setdefault(number, []).append(values if len(line) <= room else None)
    # Who answers twice guesses.
    return [len(a) == 1 and test.passed(a[0]) for test, a in ((t, answers.get(n, [])) for n, t in enumerate(tests))]


@cache
def _driver() -> str:
    return Path(__file__).with_name("code_driver.py").read_text("utf-8")
