"""Sides in turn: each does a step while the others stand still; ratios of neighbours, their median and spread."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from gate import ADDRESS, BenchError

HERE = Path(__file__).parent
WAIT = 600
"""Seconds after which a side that has not come to the gate is given up."""
WARM = 2
"""First steps that are not counted, unless a side says otherwise: they load, start threads and fill caches."""


@dataclass
class Side:
    """A process at the gate."""

    name: str
    process: subprocess.Popen[bytes]
    gate: Connection
    log: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    warm: int = WARM
    """First steps that are not counted."""
    scale: float = 1.0
    """Seconds are multiplied by it: where its steps have another number of tokens than the others'."""

    def step(self) -> None:
        """Wait for the end of the step that it was let do."""
        try:
            if self.gate.poll(WAIT):
                self.steps.append(self.gate.recv())
                return
        except (EOFError, ConnectionResetError):
            raise BenchError(f"{self.name} ended early: {last_line(self.log)}") from None
        raise BenchError(f"{self.name} did no step within {WAIT} s; see {self.log}")

    def go_on(self, steps: int = 1) -> None:
        """Let it do some more steps."""
        for _ in range(steps):
            self.gate.send(None)
            self.step()

    def end(self) -> None:
        """It has done enough: it and what it started are killed."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.gate.close()

    @property
    def seconds(self) -> list[float]:
        """Of its steps, without the first ones; what was done once before them is spread over all of them."""
        once = self.steps[0].get("once", 0.0) / self.steps[0].get("of", 1)
        return [self.scale * (s["seconds"] + once) for s in self.steps[self.warm :]]

    @property
    def peak(self) -> float:
        """GiB that the process took at most."""
        return float(max(s["peak_gib"] for s in self.steps))

    def mean(self, name: str) -> float | None:
        """Of something that it told of its steps."""
        told = [s[name] for s in self.steps[self.warm :] if s.get(name) is not None]
        return statistics.fmean(told) if told else None


def last_line(log: Path) -> str:
    """Of what a process said, with where the rest stands."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["it said nothing"]
    return f"{lines[-1].strip()} (all of it: {log})"


def start(name: str, command: Sequence[str], work: Mapping[str, Any]) -> Side:
    """Start a side, which does its first step and comes to the gate."""
    folder = Path(work["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    address = str(folder / "gate")
    log = folder / "log.txt"
    with Listener(address, "AF_UNIX") as listener, log.open("wb") as out:
        process = subprocess.Popen(
            [*command, json.dumps(work)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", ADDRESS: address},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]  # it has no public one
        for _ in range(WAIT):
            with suppress(TimeoutError):
                side = Side(name, process, listener.accept(), log)
                side.step()
                return side
            if process.poll() is not None:
                raise BenchError(f"{name} ended early: {last_line(log)}")
        process.kill()
        raise BenchError(f"{name} did not come to the gate within {WAIT} s; see {log}")


def in_turn(sides: Sequence[Side], rounds: int) -> None:
    """All sides do a step, one after the other, in every round."""
    for _ in range(rounds):
        for side in sides:
            side.go_on()


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
    """Of the seconds of neighbouring steps; of the last ones, where one side has done more."""
    n = min(len(slow), len(fast))
    assert n, "no step was counted"
    ratios = [a / b for a, b in zip(slow[-n:], fast[-n:], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if n > 1 else ratios * 3
    return Ratio(statistics.median(ratios), quartiles[0], quartiles[2])
