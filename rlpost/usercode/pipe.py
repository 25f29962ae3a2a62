"""A user's process and the pipe to it: one thread starts it, writes requests, reads replies and keeps deadlines.

So any thread may ask, and any number of calls be under way. Calls of plain functions are answered in turn, and only the
clock of the first one runs; those of coroutine functions are under way together, and their clocks stand still while a
plain function is at work.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from rlpost.usercode.stop import Stop, Stopped

START_LIMIT = 120.0
"""Seconds that Python itself may take to start (a tenth on an idle machine)."""
GRACE = 5.0
"""Seconds in which a coroutine that was cancelled must end; then its process is ended."""
_SCRIPT = Path(__file__).with_name("worker.py")
_NAP = 0.002
_PATIENCE = 0.25
"""Seconds between checks, while a call is under way, for a signal to us or a death that a grandchild hides."""
_lives = count(1)


class Gone(Exception):
    """A call was lost with its process; the message says why: `ran for over 60 s`, `ended its process (SIGSEGV)`."""

    def __init__(self, reason: str, begun: bool = True) -> None:
        super().__init__(reason)
        self.begun = begun
        """False: its turn had not come, and it may be asked again."""


@dataclass(eq=False)
class Call:
    """A call that is sent, and its reply."""

    number: tuple[int, int]
    """Of the request, and of the call in it."""
    deadline: float
    """Seconds that it may take."""
    together: bool = False
    """It is of a coroutine function, and under way with others."""
    reply: Future[dict[str, Any]] = field(default_factory=Future)
    """Raises `Gone`, or `Stopped`: a signal asked us to stop, and the process was ended."""
    limit: float = 0.0
    """When its time is over; of calls in turn, of the first alone."""
    cancelled: bool = False
    """It was told to end."""
    abandoned: bool = False
    """Nobody waits for its reply."""

    def __post_init__(self) -> None:
        self.reply.set_running_or_notify_cancel()  # whoever waits may stop waiting; the reply comes all the same


class Pipe:
    """One process, from its start to its end."""

    def __init__(self, hello: bytes, loading: float) -> None:
        """Start it; requests may be sent at once.

        Args:
            hello: the first line it reads.
            loading: seconds that running its file may take.
        """
        self.life = next(_lives)
        """A number of its own."""
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._over = False
        self._error: BaseException | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent = deque([memoryview(hello)])
        self._unfinished = b""
        self._up, self._description = Call((0, 0), START_LIMIT), Call((0, 1), loading)
        self._in_turn = deque([self._up, self._description])
        self._together: dict[tuple[int, int], Call] = {}
        self._turns_since = time.monotonic()
        self._up.limit = self._turns_since + START_LIMIT
        self._awake, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        # The process is started in this thread, which lasts as long: Linux ends it with the thread (worker.py).
        self._thread = threading.Thread(target=self._run, name="user's process", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it takes requests; not in a fork, since pipes cannot be shared."""
        process = self._process
        return self._owner == os.getpid() and not self._over and (process is None or process.poll() is None)

    def described(self) -> dict[str, Any]:
        """What it said of its file once it had run it; raises `Gone` or `Stopped`."""
        return self._description.reply.result()

    def send(self, request: Sequence[bytes], calls: Sequence[Call]) -> None:
        """Send a request, the lines of some calls.

        Raises:
            Gone: it has ended, and none has begun.
            Stopped: a signal asked us to stop, and it was ended.
        """
        with self._lock:
            if self._over:
                raise self._error or Gone("its process has ended", begun=False)
            now = time.monotonic()
            for call in calls:
                call.limit = now + call.deadline
                if call.together:
                    self._together[call.number] = call
            in_turn = [call for call in calls if not call.together]
            if in_turn and not self._in_turn:
                self._turns_since = now
            self._in_turn += in_turn
            self._unsent.append(memoryview(b"".join(request)))
            self._rouse()

    def abandon(self, calls: Collection[Call]) -> None:
        """Nobody waits for these calls any more.

        Coroutines are cancelled. A plain function can only be ended with its process, and is unless others wait for it.
        """
        left = [call for call in calls if not call.reply.done()]
        if not left:
            return
        with self._lock:
            if self._over:
                return
            for call in left:
                call.abandoned = True
            self._cancel([call for call in left if call.together], time.monotonic())
            needed = any(not call.abandoned for call in (*self._in_turn, *self._together.values()))
            open_calls = None if needed or all(call.together for call in left) else self._close(None)
            self._rouse()
        if open_calls is not None:
            self._fail(*open_calls, "its process was ended")

    def end(
        self, why: str = "its process was ended", blamed: Collection[Call] = (), error: BaseException | None = None
    ) -> None:
        """End it and what it has started; calls that are under way fail.

        Args:
            why: what happened.
            blamed: calls that it happened to; by default all that had begun.
            error: raised by all calls, in place of `Gone`.
        """
        if self._owner != os.getpid():
            return
        with self._lock:
            open_calls = None if self._over else self._close(error)
        if open_calls is not None:
            self._fail(*open_calls, why, blamed)

    def _close(self, error: BaseException | None) -> tuple[list[Call], list[Call]]:
        """Take no more requests; returns the calls that had begun, and those whose turn had not come."""
        self._over, self._error = True, error
        self._rouse()
        hello = [call for call in self._in_turn if call in (self._up, self._description)]
        in_turn = list(self._in_turn)[len(hello) :]
        return [*hello, *in_turn[:1], *self._together.values()], in_turn[1:]

    def _fail(self, begun: Sequence[Call], behind: Sequence[Call], why: str, blamed: Collection[Call] = ()) -> None:
        """End the process and tell the callers."""
        _kill(self._process)
        for call in begun:
            alone = f"was lost with its process, as another call of its file {why}"
            call.reply.set_exception(self._error or Gone(alone if blamed and call not in blamed else why))
        for call in behind:
            call.reply.set_exception(self._error or Gone(why, begun=False))
        if self._thread is not threading.current_thread():
            self._thread.join(GRACE)

    def _rouse(self) -> None:
        """Let the thread look at what has changed; its pipe is open as long as it has not ended."""
        with suppress(BlockingIOError):  # it is full of calls to do so
            os.write(self._wake, b".")

    def _run(self) -> None:
        """What the thread does."""
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # a terminal's Ctrl-C goes to our process group
            )
            with self._lock:
                self._process = process
            if self._over:  # by then there was nothing to kill
                _kill(process)
            else:
                self._serve(process)
        except BaseException as error:  # whatever it is, the callers are told
            self.end(error=error)
        finally:
            for pipe in () if self._process is None else (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):
                    _open(pipe).close()
            with self._lock:
                os.close(self._awake)
                os.close(self._wake)

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Write, read and keep the time until the process has ended."""
        stdin, stdout = _open(process.stdin).fileno(), _open(process.stdout).fileno()
        os.set_blocking(stdin, False)
        os.set_blocking(stdout, False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._awake, selectors.EVENT_READ)
            selector.register(stdout, selectors.EVENT_READ)
            writing = False
            while not self._over:
                if bool(self._unsent) != writing:
                    writing = not writing
                    selector.register(stdin, selectors.EVENT_WRITE) if writing else selector.unregister(stdin)
                if not writing and len(self._in_turn) + len(self._together) > 1:
                    time.sleep(_NAP)  # otherwise each of many replies would wake us, and switch processes
                ready = {key.fd for key, _ in selector.select(self._patience())}
                if self._awake in ready:
                    os.read(self._awake, 1 << 12)
                if stdin in ready:
                    self._write(stdin)
                ended = process.poll() is not None  # before the last replies are read
                if not self._read(stdout) or ended:
                    self.end(_ending(process))
                self._keep_time(time.monotonic())

    def _patience(self) -> float | None:
        """Seconds until something must be looked at, if nothing comes."""
        with self._lock:
            timed = self._timed()
        if not timed:
            return None
        return max(0.0, min(_PATIENCE, min(call.limit for call in timed) - time.monotonic()))

    def _timed(self) -> list[Call]:
        """The calls whose clocks run."""
        return [self._in_turn[0]] if self._in_turn else list(self._together.values())

    def _write(self, stdin: int) -> None:
        data = self._unsent[0]
        try:
            data = data[os.write(stdin, data[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # `_read` will notice
            data = data[:0]
        if data:
            self._unsent[0] = data
        else:
            self._unsent.popleft()

    def _read(self, stdout: int) -> bool:
        """Take the replies that have come; False at the end of the pipe."""
        while True:
            try:
                read = os.read(stdout, 1 << 16)
            except BlockingIOError:
                return True
            if not read:
                return False
            *lines, self._unfinished = (self._unfinished + read).split(b"\n")
            for line in lines:
                self._take(json.loads(line))

    def _take(self, reply: dict[str, Any]) -> None:
        number, now = tuple(reply["of"]), time.monotonic()
        with self._lock:
            if self._over:
                return
            if self._in_turn and self._in_turn[0].number == number:
                call = self._in_turn.popleft()
                if self._in_turn:
                    self._in_turn[0].limit = now + self._in_turn[0].deadline
                else:
                    for other in self._together.values():
                        other.limit += now - self._turns_since
            else:
                call = self._together.pop(number)
        call.reply.set_result({"failed": _late(call), "trace": ""} if call.cancelled else reply)
        if call is self._description and "failed" in reply:
            self.end(f"ended its process, and its file no longer loads ({reply['failed']})")

    def _keep_time(self, now: float) -> None:
        """End what was asked to stop, or has taken too long."""
        with self._lock:
            timed = self._timed()
            late = [call for call in timed if now >= call.limit]
            still = [call for call in late if call.together and not call.cancelled]
            self._cancel(still, now)
        if any(Stop.over(now, call.limit - call.deadline) for call in timed):
            self.end(error=Stopped())
        if hopeless := [call for call in late if call not in still]:
            begins = hopeless[0] in (self._up, self._description)
            self.end(_late(hopeless[0]), () if begins else hopeless)

    def _cancel(self, calls: Collection[Call], now: float) -> None:
        """Tell coroutines to end."""
        for call in calls:
            call.cancelled, call.limit = True, now + GRACE
            self._unsent.append(memoryview(json.dumps({"cancel": call.number}).encode() + b"\n"))


def _late(call: Call) -> str:
    return f"ran for over {call.deadline:g} s"


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _ending(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    if code >= 0:
        return f"ended its process (exit code {code})"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    memory = ", as out of memory does" if -code == signal.SIGKILL else ""
    return f"ended its process ({name}{memory})"


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
