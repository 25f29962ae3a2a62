"""The most memory that a process takes, on both sides, over two steps: of models too slow to be timed by the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare import PLAIN, WORKLOADS, Bench, defaults_of_peer

MEMORY = "memory of "
NAMES = ("sft", "dpo", "grpo", "sft-50M", "sft-135M-lora")


def memory(name: str, folder: Path, kept: Path, wish: str) -> dict[str, Any]:
    """GiB of rlpost, of TRL in float32 without recomputation, and at its defaults; one process at a time."""
    bench = Bench(name, WORKLOADS[name], folder, kept, wish, 1)
    peaks = {}
    try:
        bench.prepare()
        for label in ("rlpost", "TRL tuned", "TRL defaults"):
            options = {**PLAIN, "bf16": False} if label == "TRL tuned" else defaults_of_peer()
            side = bench.own(label, bench.precision) if label == "rlpost" else bench.peer(label, options)
            side.go_on()
            peaks[label] = side.peak
            bench.drop(side)
    finally:
        for side in bench.sides:
            side.end()
    return {"workload": MEMORY + name, "peak_gib": peaks}
