"""Seconds from the command to what a user waits for: help, a checked recipe, the demo's first optimiser step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gate import BenchError

COMMANDS = {"rlpost --help": ["--help"], "rlpost show demo": ["show", "demo"]}
BARS = {"rlpost --help": 0.25, "rlpost show demo": 0.5, "rlpost train demo, to its first step": 6.0}


def start_up(folder: Path, root: Path, times: int = 7) -> dict[str, Any]:
    """Medians of some runs."""
    env = {**os.environ, "PYTHONPATH": str(root)}
    env.pop("OMP_NUM_THREADS", None)
    seconds = {}
    for name, words in COMMANDS.items():
        seconds[name] = statistics.median(_run(words, env) for _ in range(times))
    some = [_to_first_step(folder / f"demo-{n}", env) for n in range(max(1, times // 2))]
    seconds["rlpost train demo, to its first step"] = statistics.median(some)
    return {"workload": "start", "seconds": seconds, "bars": BARS}


def _run(words: list[str], env: dict[str, str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rlpost", *words], env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def _to_first_step(folder: Path, env: dict[str, str]) -> float:
    """Until metrics.jsonl of the first stage has a line."""
    folder.mkdir(parents=True)
    log = folder / "runs/bench/sft/metrics.jsonl"
    words = ["train", "demo", f"runs={folder / 'runs'}", "run=bench"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlpost", *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (log.exists() and log.stat().st_size):
            if process.poll() is not None:
                raise BenchError("start: rlpost train demo ended before its first step")
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
