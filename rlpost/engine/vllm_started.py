"""Servers of vLLM that the run starts: kept for its later engines, and ended with the run at the latest."""

from __future__ import annotations

import atexit
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from rlpost.errors import EngineError

STARTING = 1800.0
"""Seconds that a server may take to load a model and compile it."""
_HOST = "127.0.0.1"
_NAP = 0.2
_KEEPER = Path(__file__).with_name("vllm_keeper.py")
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables of the run's own processes, which vLLM would take for its own."""
_CAUSE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+|.*: error: .+)$")
"""A line of a log that says what went wrong; of several the first, since vLLM's processes raise what they are told."""

_idle: list[Started] = []
_running: list[Started] = []


@dataclass
class Started:
    """One server."""

    program: str
    flags: tuple[str, ...]
    """All but the model and where it listens."""
    environment: Mapping[str, str]
    """Added to the run's."""
    model: str
    """What its weights must fit: the base of adapters, or a configuration."""
    where: str
    """The key path of the engine's section."""
    url: str = ""
    log: Path | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self, path: str, tokenizer: Path) -> None:
        """Start it with the model at `path` and wait until it answers; what was started before is ended.

        Raises:
            EngineError: it ends before that, or does not answer.
        """
        self.end()
        with socket.socket() as free:
            free.bind((_HOST, 0))
            port = free.getsockname()[1]
        self.url = f"http://{_HOST}:{port}"
        here = ["--tokenizer", str(tokenizer), "--host", _HOST, "--port", str(port)]
        command = [self.program, "serve", path, *self.flags, *here]
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith("TORCHELASTIC_")}
        with tempfile.NamedTemporaryFile(prefix="rlpost-vllm-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_KEEPER), str(os.getpid()), *command],
                stdin=subprocess.PIPE,  # closed when the run ends, whatever ends it
                stdout=log,
                stderr=log,
                env=environment | dict(self.environment),
                start_new_session=True,  # a terminal's Ctrl-C is the run's
            )
        _running.append(self)
        try:
            self._wait()
        except BaseException as error:
            self.end(keep_log=isinstance(error, EngineError))
            raise

    @property
    def kind(self) -> tuple[Any, ...]:
        """What makes servers interchangeable."""
        return self.program, self.flags, dict(self.environment), self.model

    @property
    def lives(self) -> bool:
        """It has not ended."""
        return self._process is not None and self._process.poll() is None

    def end(self, keep_log: bool = False) -> None:
        """End it and all its processes; its log stays where it has ended by itself, since a message names it."""
        process, self._process = self._process, None
        if process is None:
            return
        keep_log = keep_log or process.poll() is not None
        _running.remove(self)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        if self.log is not None and not keep_log:
            self.log.unlink(missing_ok=True)

    def cause(self) -> str:
        """What its log says about its end, and where the log is."""
        lines = [] if self.log is None else self.log.read_text("utf-8", errors="replace").splitlines()
        found = [match[1] for line in lines if (match := _CAUSE.search(line))]
        last = [line for line in lines if line.strip()][-1:]
        code = None if self._process is None else self._process.poll()
        ended = "" if code is None else f"exit code {code} after "
        said = found[0] if found else ended + (last[0] if last else "it said nothing")
        return f"{' '.join(said.split())[:300]} (all of it: {self.log})"

    def _wait(self) -> None:
        deadline = time.monotonic() + STARTING
        while not _healthy(self.url):
            if not self.lives:
                raise EngineError(f"{self.where}: {self.program} serve ended while it started: {self.cause()}")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.where}: {self.program} serve does not answer after {STARTING:g} s: {self.cause()}"
                )
            time.sleep(_NAP)


def taken(wanted: Started) -> Started | None:
    """One like `wanted` that runs and that no engine uses; others that no engine uses are ended."""
    found = None
    for server in list(_idle):
        if found is None and server.lives and server.kind == wanted.kind:
            found = server
        else:
            server.end()
        _idle.remove(server)
    return found


def give_back(server: Started, *, usable: bool) -> None:
    """Keep it for the run's next engine, or end it."""
    if usable and server.lives:
        _idle.append(server)
    else:
        server.end()


def _healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


@atexit.register
def _end_all() -> None:
    for server in list(_running):
        with suppress(OSError):
            server.end()
