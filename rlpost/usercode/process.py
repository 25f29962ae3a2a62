"""The process of one user's file, seen from the parent: started when needed, ended when a call takes too long.

Not `multiprocessing`: a plain script on a pipe does not import `__main__` again, pickles nothing, and ends when this
end of the pipe closes.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rlpost.usercode.stop import Stop, Stopped

START_LIMIT = 120.0
"""Seconds that Python itself may take to start (a tenth on an idle machine)."""
_SCRIPT = Path(__file__).with_name("worker.py")
_NAP = 0.002
_PATIENCE = 0.25
"""Seconds between checks, while waiting, for a signal to us or a death that a grandchild hides."""


class Gone(Exception):
    """The process has ended; the message says why: `ran for over 60 s`, `ended its process (exit code 0)`."""


class UserProcess:
    """One process; `start` before anything else."""

    def __init__(self, file: Path, digest: str) -> None:
        self._file = file
        self._digest = digest
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._unfinished = b""
        self._lines: deque[bytes] = deque()

    @property
    def running(self) -> bool:
        """Whether there is a process; a fork has none, since pipes cannot be shared."""
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def start(self, deadline: float) -> dict[str, Any]:
        """Start it and let it run the file for at most `deadline` seconds; returns its description of the file.

        Raises:
            Gone: it ended, or took too long.
        """
        self.end()
        self._unfinished = b""
        self._lines.clear()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C goes to our process group
        )
        _running.append(self)
        os.set_blocking(_descriptor(self._process.stdin), False)
        hello = {"path": sys.path, "file": str(self._file), "digest": self._digest}
        (up,) = self.ask(json.dumps(hello).encode() + b"\n", 1, START_LIMIT)
        assert up == {"up": True}
        (reply,) = self.ask(b"", 1, deadline)
        return reply

    def ask(self, request: bytes, replies: int, deadline: float) -> Iterator[dict[str, Any]]:
        """The replies to a request, each of which may take `deadline` seconds.

        Raises:
            Gone: the process ended, or took too long and was ended.
            Stopped: a signal asked us to stop, and the process was ended.
        """
        assert self._process is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(_descriptor(self._process.stdout), selectors.EVENT_READ)
                if request:
                    selector.register(_descriptor(self._process.stdin), selectors.EVENT_WRITE)
                unsent = memoryview(request)
                for left in range(replies, 0, -1):
                    limit = time.monotonic() + deadline
                    while not self._lines:
                        if left > 1 and not unsent:
                            time.sleep(_NAP)  # otherwise each reply of a batch would wake us, and switch processes
                        ready = {key.fd for key, _ in self._wait(selector, limit, deadline)}
                        if _descriptor(self._process.stdin) in ready:
                            unsent = self._send(unsent, selector)
                        if _descriptor(self._process.stdout) in ready:
                            self._read()
                    yield json.loads(self._lines.popleft())
        except GeneratorExit:
            self.end()  # the caller wants no more replies; it would answer the next request with them
            raise
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End it and the processes it has started."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        _running.remove(self)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _wait(self, selector: selectors.BaseSelector, limit: float, deadline: float) -> list[Any]:
        assert self._process is not None
        while True:
            now = time.monotonic()
            ready = selector.select(max(0.0, min(_PATIENCE, limit - now)))
            if ready:
                return ready
            if Stop.over(now):
                raise Stopped
            if self._process.poll() is not None:
                raise Gone(self._ended())
            if now >= limit:
                raise Gone(f"ran for over {deadline:g} s")

    def _send(self, unsent: memoryview, selector: selectors.BaseSelector) -> memoryview:
        assert self._process is not None
        stdin = _descriptor(self._process.stdin)
        try:
            unsent = unsent[os.write(stdin, unsent[: 1 << 16]) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError:  # `_read` will notice
            unsent = unsent[:0]
        if not unsent:
            selector.unregister(stdin)
        return unsent

    def _read(self) -> None:
        """Read available output."""
        assert self._process is not None
        read = os.read(_descriptor(self._process.stdout), 1 << 16)
        if not read:
            raise Gone(self._ended())
        *lines, self._unfinished = (self._unfinished + read).split(b"\n")
        self._lines += lines

    def _ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        if code >= 0:
            return f"ended its process (exit code {code})"
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        memory = ", as out of memory does" if -code == signal.SIGKILL else ""
        return f"ended its process ({name}{memory})"


_running: list[UserProcess] = []


def end_all() -> None:
    """End every user's process."""
    for process in list(_running):
        process.end()


atexit.register(end_all)


def _descriptor(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()
