"""Two sides in turn: each does a step while the other stands still; ratios of neighbours, their median and spread."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from gate import ADDRESS

HERE = Path(__file__).parent
WAIT = 600
"""Seconds after which a side that has not come to the gate is given up."""


@dataclass
class Side:
    """A process at the gate."""

    name: str
    process: subprocess.Popen[bytes]
    gate: Connection
    log: Path
    steps: list[dict[str, Any]] = field(default_factory=list)

    def step(self) -> None:
        """Wait for the end of the step that it was let do."""
        if not self.gate.poll(WAIT):
            raise SystemExit(f"{self.name} did no step within {WAIT} s; see {self.log}")
        try:
            self.steps.append(self.gate.recv())
        except EOFError:
            raise SystemExit(f"{self.name} ended; see {self.log}") from None

    def go_on(self) -> None:
        """Let it do the next one."""
        self.gate.send(None)

    def end(self) -> None:
        """It has done enough."""
        self.process.kill()
        self.process.wait()

    def seconds(self, warm: int) -> list[float]:
        """Of its steps, without the first ones."""
        return [s["seconds"] for s in self.steps[warm:]]

    @property
    def peak(self) -> float:
        """GiB that the process took at most."""
        return max(s["peak_gib"] for s in self.steps)


def start(name: str, python: str, script: str, work: Mapping[str, Any], env: Mapping[str, str]) -> Side:
    """Start a side, which comes to the gate with its first step."""
    folder = Path(work["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    address = str(folder / "gate")
    log = folder / "log.txt"
    with Listener(address, "AF_UNIX") as listener, log.open("wb") as out:
        process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(work)],
            env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", ADDRESS: address, **env},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        listener._listener._socket.settimeout(WAIT)  # type: ignore[attr-defined]  # it has no public one
        try:
            gate = listener.accept()
        except TimeoutError:
            process.kill()
            raise SystemExit(f"{name} did not come to the gate; see {log}") from None
    return Side(name, process, gate, log)


def in_turn(sides: Sequence[Side], steps: int) -> None:
    """All sides do `steps` steps, one after the other in every round; all have done their first one."""
    for _ in range(steps - 1):
        for side in sides:
            side.go_on()
            side.step()


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one side is as another."""

    median: float
    low: float
    high: float
    """First and last quartile."""

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f} to {self.high:.2f})"


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Of the seconds of neighbouring steps."""
    ratios = [a / b for a, b in zip(slow, fast, strict=False)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Ratio(statistics.median(ratios), quartiles[0], quartiles[2])


def python_of_peer(root: Path) -> str:
    """The interpreter of .venv-bench, or of RLPOST_BENCH_PYTHON."""
    python = os.environ.get("RLPOST_BENCH_PYTHON", str(root / ".venv-bench/bin/python"))
    if not Path(python).exists():
        sys.exit(f"{python}: no such interpreter; `make bench` makes it")
    return python
