"""Processes that run the command line and can be killed at a chosen instant.

They are forked from a server that has imported everything, so that each starts at once. A trap is a real signal
that the process sends itself when a function is called for the n-th time: SIGKILL ends it there, without a chance
to tidy up, as `kill -9` would.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trap:
    """Send `number` to the own process just before the `at`-th call of `target`."""

    target: str
    """`module:name` or `module:Class.name`, as the caller looks it up."""
    at: int = 1
    number: int = signal.SIGKILL

    def set(self) -> None:
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function = getattr(owner, name)
        calls = 0

        def trapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == self.at:
                os.kill(os.getpid(), self.number)
            return function(*args, **kwargs)

        setattr(owner, name, trapped)


def start(
    words: list[str], output: Path, trap: Trap | None = None, environment: Mapping[str, str] | None = None
) -> multiprocessing.Process:
    """Start `rlpost WORDS`, with more variables; what it prints goes to `output`.out and `output`.err."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlpost.pipeline", "rlpost.cli.app"])
    process = context.Process(target=_child, args=(words, str(output), trap, environment or {}))
    process.start()
    return process


def finish(words: list[str], output: Path, trap: Trap | None = None) -> int:
    """Run `rlpost WORDS` to its end; returns its exit code, minus the signal's number if it was killed."""
    process = start(words, output, trap)
    process.join(150)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def wait_until(ready: Callable[[], bool], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def finish_on_ranks(count: int, words: list[str], output: Path, traps: Mapping[int, Trap] | None = None) -> list[int]:
    """Run `rlpost WORDS` as so many processes of one run to their end; returns the exit code of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    environments = [{**shared, "RANK": n, "LOCAL_RANK": n} for n in range(count)] if count > 1 else [{}]
    processes = [
        start(words, output.with_name(f"{output.name}{n}"), (traps or {}).get(n), {k: str(v) for k, v in own.items()})
        for n, own in enumerate(environments)
    ]
    for process in processes:
        process.join(150)
    assert all(process.exitcode is not None for process in processes), "still running"
    return [process.exitcode or 0 for process in processes]


def _child(words: list[str], output: str, trap: Trap | None, environment: Mapping[str, str]) -> None:
    os.environ |= environment
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if trap is not None:
        trap.set()
    from rlpost.cli.app import main

    sys.argv = ["rlpost", *words]
    main()
