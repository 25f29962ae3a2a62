from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlpost.errors import RewardError
from rlpost.rewards.workers import Workers

GUARD = 100.0
"""Seconds after which something hangs, on however busy a machine."""
SCRIPT = """
import json, os, signal, sys, time
print("ready", flush=True)
for line in sys.stdin:
    reference, answer, seconds = json.loads(line)
    if answer == "sleep":
        time.sleep(600)
    if answer == "die":
        os._exit(3)
    if answer == "pid":
        answer = str(os.getpid())
    print(answer, flush=True)
"""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Workers]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    workers = Workers(script)
    yield workers
    workers.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child of someone else may stay a zombie for a moment.
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def wait_until_gone(pid: int) -> bool:
    end = time.monotonic() + GUARD
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_replies_keep_their_order(pool: Workers):
    assert pool.judge([("", str(i)) for i in range(50)], GUARD) == [str(i) for i in range(50)]
    assert pool.judge([], GUARD) == []


def test_a_sleeping_worker_is_killed_at_its_deadline(pool: Workers):
    pool.judge([("", "a"), ("", "b")], GUARD)
    assert pool.judge([("", "sleep"), ("", "a"), ("", "b")], 2.0) == ["timeout", "a", "b"]
    assert pool.judge([("", "c")], GUARD) == ["c"]


def test_both_workers_may_hang(pool: Workers):
    items = [("", "sleep"), ("", "sleep"), ("", "a"), ("", "sleep"), ("", "b")]
    assert pool.judge(items, 2.0) == ["timeout", "timeout", "a", "timeout", "b"]


def test_a_death_is_an_error_of_that_item_alone(pool: Workers):
    assert pool.judge([("", "die"), ("", "a"), ("", "die"), ("", "b")], GUARD) == ["error", "a", "error", "b"]


def test_a_worker_killed_between_calls_is_replaced(pool: Workers):
    (first,) = pool.judge([("", "pid")], GUARD)
    os.kill(int(first), signal.SIGKILL)
    time.sleep(0.1)
    (second,) = pool.judge([("", "pid")], GUARD)
    assert first != second


def test_an_interrupt_in_the_middle_leaves_no_stale_reply(pool: Workers):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        pool.judge([("", "a")], GUARD)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            pool.judge([("", "sleep"), ("", "sleep")], GUARD)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert pool.judge([("", "new")], GUARD) == ["new"]


def test_close_ends_the_processes(pool: Workers):
    (pid,) = pool.judge([("", "pid")], GUARD)
    assert alive(int(pid))
    pool.close()
    assert not alive(int(pid))


def test_a_worker_that_does_not_start_is_told(tmp_path: Path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(7)")
    with pytest.raises(RewardError, match=r"did not start \(ended with 7\); see why with: .*broken\.py"):
        Workers(script).judge([("", "a")], GUARD)


PARENT = """
import sys, time
from pathlib import Path
from rlpost.rewards import math
from rlpost.rewards.math import verdict
from rlpost.rewards.workers import Workers
pool = math._workers()
if sys.argv[1] == "busy":
    pool.script = Path(sys.argv[2])
print(verdict("\\\\boxed{\\\\sqrt{8}}", "2\\\\sqrt{2}").value, flush=True)
print(*[w.process.pid for w in pool._workers], flush=True)
if sys.argv[1] == "idle":
    time.sleep(60)
if sys.argv[1] == "busy":
    verdict("\\\\boxed{\\\\sqrt{7}}", "2\\\\sqrt{2}", deadline=1.5)
"""
BUSY = """
import sys, time
from rlpost.rewards import math_worker
def judge(reference, answer):
    while "7" in answer:
        pass
    return "right"
math_worker.judge = judge
math_worker.main()
"""


def start_parent(tmp_path: Path, how: str) -> tuple[subprocess.Popen[str], int]:
    """A script without a `__main__` guard, as a console script might be."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    busy = tmp_path / "busy.py"
    busy.write_text(BUSY)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(script), how, str(busy)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "right\n"  # once: nothing ran the script again
    return process, int(process.stdout.readline())


def test_workers_end_with_a_parent_that_exits(tmp_path: Path):
    process, worker = start_parent(tmp_path, "exit")
    assert process.wait(GUARD) == 0
    assert wait_until_gone(worker)


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, how: str):
    process, worker = start_parent(tmp_path, how)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert wait_until_gone(worker)


def test_a_worker_ignores_an_interrupt(tmp_path: Path):
    process, worker = start_parent(tmp_path, "idle")
    os.kill(worker, signal.SIGINT)
    time.sleep(0.3)
    try:
        assert alive(worker)
    finally:
        process.kill()
        process.wait()
    assert wait_until_gone(worker)
