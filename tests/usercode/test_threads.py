"""Functions of a user's file, called by two threads: one beside training, and the main one."""

from __future__ import annotations

import hashlib
import inspect
import threading
from pathlib import Path
from typing import Any

from rlpost.usercode import calls
from rlpost.usercode.calls import Remote

FILE = "seen = []\n\ndef echo(number):\n    seen.append(number)\n    return [number, len(seen)]\n"


def remote(folder: Path) -> Remote:
    file = folder / "mine.py"
    file.write_text(FILE)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    signature = calls.describe(file, digest, 60)["echo"]
    assert list(inspect.signature(Remote(file, digest, "echo", {}, signature)).parameters) == ["number"]
    return Remote(file, digest, "echo", {}, signature)


def in_a_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_each_thread_gets_its_own_replies(tmp_path):
    echo = remote(tmp_path)
    found: dict[int, list[Any]] = {0: [], 1: []}

    def ask(which: int) -> None:
        for first in range(20):
            given = [{"number": 1000 * which + 10 * first + i} for i in range(10)]
            found[which] += [number for number, _ in echo.each(given)]

    other = in_a_thread(lambda: ask(1))
    ask(0)
    other.join()
    assert found == {which: [1000 * which + n for n in range(200)] for which in (0, 1)}


def test_a_process_outlasts_the_thread_that_started_it(tmp_path):
    echo = remote(tmp_path)
    calls.unneeded(*echo._key)
    counts: list[int] = []
    for _ in range(3):
        in_a_thread(lambda: counts.append(echo(5)[1])).join()
    assert [*counts, echo(5)[1]] == [1, 2, 3, 4]
