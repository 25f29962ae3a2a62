"""Tiny random models and tokenizers, made once for the whole run."""

from __future__ import annotations

import collections
import gc
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two processes run the tests, each on a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Runs are compared bit for bit, which only a CPU promises.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# A shell starts what runs in its background with Ctrl-C ignored, and then no test could send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' own imports make a million objects that stay. Every stage of a run ends with a full collection, which would
# go through all of them: a quarter of the time of some files.
gc.disable()


def pytest_collection_finish() -> None:
    """All tests are imported: from here on, garbage is looked for among what they make."""
    gc.enable()
    gc.freeze()


Tally = Callable[..., None]


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """`tally("math answers", right=3, refused=1)`: what this test has just found, for the table at the end."""

    def count(kind: str, *, right: int = 0, refused: int = 0, wrong: int = 0) -> None:
        record_property("cases", (kind, right, refused, wrong))

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of `tally`: cases that came out right, were refused, or were wrong, by kind."""
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "cases" and report.when == "call":
                    kind, *found = value
                    counts[kind] = [a + b for a, b in zip(counts[kind], found, strict=True)]
    if not counts:
        return
    terminalreporter.section("cases by kind")
    terminalreporter.write_line(f"{'kind':<44} {'cases':>6} {'right':>6} {'refused':>8} {'wrong':>6}")
    for kind, found in sorted(counts.items()):
        terminalreporter.write_line(f"{kind:<44} {sum(found):>6} {found[0]:>6} {found[1]:>8} {found[2]:>6}")
