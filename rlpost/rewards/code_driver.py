"""The program that asks another one for values, within the sandbox: the standard library alone.

It reads a job from stdin, `{"program": text, "tests": count}`, imports the program, and calls what stands at its end,
`asked_0()` and so on, each of which returns a list. For each it writes a line to stdout, `[number, values]`, and
`[number, null]` where one raised or a value is no plain data. The program may do what it likes with all of this: it
then says what the values are, and does not know what they should be.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST = 100_000
"""Items that are taken from what can be iterated."""
EXACT = 1 << 53
"""Integers below are the same in every reader of JSON."""


def main() -> None:
    """Answer the job on stdin."""
    job = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the program prints is no answer
    Path("answer.py").write_text(job["program"], "utf-8", "surrogatepass")
    sys.path.insert(0, str(Path.cwd()))
    program = importlib.import_module("answer")
    for number in range(job["tests"]):
        values = None
        try:
            values = [encoded(value) for value in getattr(program, f"asked_{number}")()]
        except BaseException as error:  # of the program, SystemExit too: the next test may go better
            sys.stderr.write(f"{type(error).__name__}\n")
        answers.write(json.dumps([number, values]) + "\n")
        answers.flush()
    os._exit(0)  # not waiting for what the program has begun


def encoded(value: Any) -> Any:
    """A value of plain data as JSON that keeps its type (read by `code_values.decoded`); TypeError for another."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < EXACT else {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encoded(key), encoded(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [encoded(item) for item in value]
    for name, kind in (("tuple", tuple), ("set", set | frozenset), ("each", Iterable)):
        if isinstance(value, kind):
            items = [encoded(item) for item in itertools.islice(value, MOST + 1)]
            if len(items) <= MOST:
                return {name: items}
    raise TypeError(f"a {type(value).__name__} is no plain data")


if __name__ == "__main__":
    main()
