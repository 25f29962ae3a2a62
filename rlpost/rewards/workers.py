"""Worker processes that compare one item at a time and are killed when one takes too long.

Not `multiprocessing`: a plain script on a pipe does not import `__main__` again, pickles nothing, and ends when this
end of the pipe closes.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rlpost.errors import RewardError

START_LIMIT = 120.0
"""Seconds a worker may take to import its libraries (one or two on an idle machine)."""
_STARTING = -1


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    item: int | None
    """Index of the item it works on; None when idle, `_STARTING` while it starts."""
    limit: float
    """Monotonic time at which it is killed."""
    unfinished: bytes = b""
    """Its output so far of an unfinished line."""


class Workers:
    """A pool of worker scripts, started when first needed and again after one was killed."""

    def __init__(self, script: Path, size: int = 2) -> None:
        self.script = script
        self.size = size
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def judge(self, items: Sequence[tuple[str, str]], deadline: float) -> list[str]:
        """The reply to each (reference, answer): `timeout` after `deadline` seconds, `error` for a crash.

        Raises:
            RewardError: a worker does not start.
        """
        replies = [""] * len(items)
        waiting = deque(range(len(items)))
        with self._lock:
            try:
                while waiting or any(w.item not in (None, _STARTING) for w in self._workers):
                    self._hand_out(items, waiting, deadline)
                    for worker, reply in self._listen():
                        if worker.item == _STARTING and reply != "ready":
                            raise RewardError(self._not_started(worker, reply))
                        if worker.item is not None and worker.item != _STARTING:
                            replies[worker.item] = reply
                        worker.item = None
                        if reply in ("timeout", "died"):
                            self._end(worker)
            except BaseException:
                self._close()  # otherwise a busy worker would answer the next call with this one's reply
                raise
        return ["error" if reply == "died" else reply for reply in replies]

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        for worker in list(self._workers):
            self._end(worker)

    def _hand_out(self, items: Sequence[tuple[str, str]], waiting: deque[int], deadline: float) -> None:
        for worker in [w for w in self._workers if w.item is None and w.process.poll() is not None]:
            self._end(worker)
        idle = [w for w in self._workers if w.item is None]
        starting = sum(w.item == _STARTING for w in self._workers)
        for worker in idle[: len(waiting)]:
            worker.item = waiting.popleft()
            worker.limit = time.monotonic() + deadline
            request = json.dumps([*items[worker.item], deadline]).encode() + b"\n"
            with suppress(BrokenPipeError):  # it just died; `_listen` will notice
                os.write(_descriptor(worker.process.stdin), request)
        for _ in range(min(len(waiting) - starting, self.size - len(self._workers))):
            self._start()

    def _start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", str(self.script)],  # -P: the script's folder holds a math.py
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C goes to our process group
        )
        self._workers.append(_Worker(process, _STARTING, time.monotonic() + START_LIMIT))

    def _listen(self) -> list[tuple[_Worker, str]]:
        """Wait for a reply, a death or a deadline, and return the workers that had one."""
        busy = [w for w in self._workers if w.item is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(_descriptor(worker.process.stdout), selectors.EVENT_READ, worker)
            patience = min(w.limit for w in busy) - time.monotonic()
            readable: list[_Worker] = [key.data for key, _ in selector.select(max(0.0, patience))]
        news: list[tuple[_Worker, str]] = []
        for worker in readable:
            read = os.read(_descriptor(worker.process.stdout), 4096)
            worker.unfinished += read
            if worker.unfinished.endswith(b"\n"):
                news.append((worker, worker.unfinished.decode().strip()))
                worker.unfinished = b""
            elif not read:
                news.append((worker, "died"))
        late = [w for w in busy if w not in readable and time.monotonic() >= w.limit]
        return news + [(worker, "timeout") for worker in late]

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            assert pipe is not None
            pipe.close()

    def _not_started(self, worker: _Worker, reply: str) -> str:
        reason = f"took over {START_LIMIT:g} s" if reply == "timeout" else f"ended with {worker.process.wait()}"
        return (
            f"math_answer: its worker process did not start ({reason}); see why with: "
            f"{sys.executable} -P {self.script} < /dev/null"
        )


def _descriptor(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()
