"""One program at one level, seen from the parent: started, fed, read, and ended when it wrote too much."""

from __future__ import annotations

import os
import platform
import selectors
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from rlpost.sandbox import seccomp
from rlpost.sandbox.outcome import Level, Limits, Outcome, Reason

START_LIMIT = 60.0
"""Seconds, beyond those of the program, after which the process that waits for it is given up (a tenth when idle)."""
BOX = "/box"
"""The folder of a program where the file system is its own."""
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All of the program's environment: sets of text have the same order in every run."""
_START = "import sys; sys.path.append(sys.argv.pop(1)); import child; child.main()"
"""Imported, for a script would be compiled each time."""
_SCRIPT = Path(__file__).with_name("child.py")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")


class Broken(Exception):
    """The sandbox could not be made; the message says what failed."""


def execute(program: str, stdin: str, limits: Limits, level: Level) -> Outcome:
    """Run a program at a level, and wait for its end.

    Raises:
        Broken: a part of the sandbox could not be made; the program was not run.
    """
    folder = tempfile.mkdtemp(prefix="rlpost-")
    try:
        return _Run(program.encode("utf-8", "surrogatepass"), stdin, limits, level, folder).outcome()
    finally:
        clear(Path(folder))


def _words(limits: Limits, level: Level, folder: str) -> list[str]:
    """What does not change with the program of the job, as `child.Job` reads it."""
    machine = platform.machine()
    rules = seccomp.program(machine)
    if rules is None or sys.platform != "linux":
        raise Broken(f"there is none for {sys.platform} on {machine}")
    python, read = _python()
    return [
        f"level={level}",
        f"python={python}",
        *(f"environment={name}={value}" for name, value in ENVIRONMENT.items()),
        f"root={folder}",
        f"box={BOX if level is Level.namespaces else folder}",
        *(f"read={path}" for path in read),
        *(f"device={path}" for path in _DEVICES),
        f"filter={rules.hex()}",
        f"own_id={seccomp.OWN_ID}",
        *(f"{field.name}={getattr(limits, field.name)}" for field in fields(limits)),
    ]


@cache
def _python() -> tuple[str, list[str]]:
    """(the interpreter itself, not a virtual environment's; what it reads), as paths."""
    python = str(Path(getattr(sys, "_base_executable", "") or sys.executable).resolve())
    places = [str(Path(python).parents[1]), sys.base_prefix, sys.base_exec_prefix]
    own = [str(Path(place) / name) for place in places for name in ("lib", sys.platlibdir)]
    own += [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        sysconfig.get_config_var("LIBDIR") or "/lib",
    ]
    return python, list(dict.fromkeys(path for path in (*_LIBRARIES, *own, python) if Path(path).exists()))


class _Run:
    """The process that waits for a program, and the pipes to both."""

    def __init__(self, program: bytes, stdin: str, limits: Limits, level: Level, folder: str) -> None:
        words = _words(limits, level, folder)
        self._limits = limits
        self._level = level
        self._limit = time.monotonic() + limits.seconds + START_LIMIT
        self._selector = selectors.DefaultSelector()
        control_read, control_write = os.pipe()
        status_read, status_write = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    *(_python()[0], "-I", "-S", "-c", _START, str(_SCRIPT.parent)),
                    *(f"control={control_read}", f"status={status_write}", f"size={len(program)}"),
                    *words,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(control_read, status_write),
                env={},
                cwd="/",
                start_new_session=True,  # a terminal's Ctrl-C is ours alone
            )
        except BaseException:
            os.close(control_write)
            os.close(status_read)
            raise
        finally:
            os.close(control_read)
            os.close(status_write)
        self._control = control_write
        self._status, self._stdout, self._stderr = status_read, _own(self._process.stdout), _own(self._process.stderr)
        self._unsent = {
            control_write: memoryview(program),
            _own(self._process.stdin): memoryview(stdin.encode("utf-8", "surrogatepass")),
        }
        self._read = {self._status: bytearray(), self._stdout: bytearray(), self._stderr: bytearray()}
        for pipe in self._unsent:
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_WRITE)
        for pipe in self._read:
            self._selector.register(pipe, selectors.EVENT_READ)

    def outcome(self) -> Outcome:
        """Wait for the end.

        Raises:
            Broken: the sandbox could not be made.
        """
        try:
            flooded = self._talk()
        finally:
            self._process.kill()
            self._process.wait()
            self._stop()
            for key in list(self._selector.get_map().values()):
                self._close(key.fd)
            self._selector.close()
        said, _, report = self._read[self._status].decode("utf-8", "replace").partition("\n")[0].partition(" ")
        if said != "ended":
            raise Broken(report or f"the process that watches it ended with {self._process.returncode}")
        code, late, computed, seconds = report.split(" ")
        stdout, stderr = (
            bytes(self._read[pipe][: self._limits.output]).decode("utf-8", "replace")
            for pipe in (self._stdout, self._stderr)
        )
        reason = Reason.output if flooded else self._reason(int(code), late == "1", float(computed), stderr)
        return Outcome(stdout, stderr, reason, abs(int(code)), float(seconds), self._level)

    def _talk(self) -> bool:
        """Write and read until the waiting process has said how it ended; whether too much was written."""
        flooded = False
        while self._status in self._selector.get_map():
            ready = self._selector.select(max(0.0, self._limit - time.monotonic()))
            if not ready:
                raise Broken(f"no answer {START_LIMIT:g} s after the program's time was over")
            for key, _ in ready:
                if key.fd not in self._selector.get_map():
                    continue  # closed on account of another one
                if key.fd in self._unsent:
                    self._send(key.fd)
                elif self._receive(key.fd) and key.fd != self._status and not flooded:
                    flooded = len(self._read[key.fd]) > self._limits.output
                    if flooded:
                        self._stop()
        self._drain()
        return flooded or any(len(self._read[p]) > self._limits.output for p in (self._stdout, self._stderr))

    def _drain(self) -> None:
        """Read what still lies in the pipes: no process writes to them any more."""
        for pipe in (self._stdout, self._stderr):
            if pipe in self._selector.get_map():
                os.set_blocking(pipe, False)
                try:
                    while self._receive(pipe):
                        pass
                except BlockingIOError:
                    continue

    def _send(self, pipe: int) -> None:
        unsent = self._unsent[pipe]
        try:
            self._unsent[pipe] = unsent = unsent[os.write(pipe, unsent[: 1 << 16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it does not read, or has ended; then the status says how
            unsent = unsent[:0]
        if not unsent and pipe == self._control:
            self._selector.unregister(pipe)  # it stays open: when it is closed, the program is ended
        elif not unsent:
            self._close(pipe)

    def _stop(self) -> None:
        """Have the program ended."""
        if self._control >= 0:
            if self._control in self._selector.get_map():
                self._selector.unregister(self._control)
            os.close(self._control)
            self._control = -1

    def _receive(self, pipe: int) -> bool:
        """Read what is there, and keep what may be kept; False at the end."""
        read = os.read(pipe, 1 << 16)
        if not read:
            self._close(pipe)
        elif len(self._read[pipe]) <= self._limits.output:
            self._read[pipe] += read
        return bool(read)

    def _close(self, pipe: int) -> None:
        self._selector.unregister(pipe)
        for file in (self._process.stdin, self._process.stdout, self._process.stderr):
            if file is not None and not file.closed and file.fileno() == pipe:
                file.close()
                return
        os.close(pipe)

    def _reason(self, code: int, late: bool, computed: float, stderr: str) -> Reason:
        killed = code in (-9, -24)  # SIGKILL, SIGXCPU
        if late or (killed and computed > self._limits.cpu_seconds - 0.1):
            return Reason.time
        if code == -31:  # SIGSYS
            return Reason.refused
        if code < 0:
            return Reason.signal
        last = stderr.rstrip().rpartition("\n")[2]
        return Reason.memory if code and last.startswith("MemoryError") else Reason.ended


def clear(folder: Path) -> None:
    """Delete a folder that a program has filled, however deep it is and whatever rights its folders have.

    One folder is open at a time and paths are never joined, so that no depth is too much; nothing else writes here.
    """
    folder.chmod(0o700)
    here = os.open(folder, _FOLDER)
    way: list[str] = []
    while True:
        below = None
        for entry in list(os.scandir(here)):
            if entry.is_dir(follow_symlinks=False):
                below = entry.name
            else:
                os.unlink(entry.name, dir_fd=here)
        if below is not None:
            os.chmod(below, 0o700, dir_fd=here)
            way.append(below)
            here = _step(here, below)
        elif way:
            here = _step(here, "..")
            os.rmdir(way.pop(), dir_fd=here)
        else:
            os.close(here)
            return folder.rmdir()


def _step(here: int, to: str) -> int:
    """Open a folder from another one, which is closed."""
    there = os.open(to, _FOLDER, dir_fd=here)
    os.close(here)
    return there


def _own(pipe: Any) -> int:
    assert pipe is not None
    return int(pipe.fileno())
