"""Tokens a second of sampling 64 rows at once; beside vLLM's CPU build where RLPOST_BENCH_VLLM_PYTHON has it."""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limit import LARGE, bandwidth, decode_seconds, throughput, throughput_of
from pairs import HERE, WARM, Side, in_turn, ratio, start
from workload import SHAPES, Lengths, make_model, make_rows, write_rows

VLLM = "RLPOST_BENCH_VLLM_PYTHON"
PROMPTS, GROUP, BEFORE, NEW = 8, 8, 80, 110
"""Rows are PROMPTS times GROUP; their context grows from BEFORE tokens by NEW."""


def decode(size: str, folder: Path, kept: Path, precision: str, rounds: int = 6) -> dict[str, Any]:
    """Sample the same prompts again and again; returns rates and the share of the least time a step can take."""
    model = make_model(kept / f"model-{size}", size)
    rows = folder / "rows.jsonl"
    write_rows(rows, "grpo", make_rows("grpo", PROMPTS, Lengths(BEFORE, 2, 0.0), SHAPES[size]["vocab_size"]))
    work = {"model": str(model), "rows": str(rows), "group": GROUP, "most": NEW, "steps": WARM + rounds}
    work["precision"] = precision
    engines = {"rlpost": sys.executable}
    if VLLM in os.environ:
        engines["vllm"] = os.environ[VLLM]
    else:
        print(f"  vLLM is left out: {VLLM} names no interpreter that has it", file=sys.stderr)
    sides: dict[str, Side] = {}
    try:
        for engine, python in engines.items():
            given = work | {"engine": engine, "folder": str(folder / engine)}
            sides[engine] = start(f"decode: {engine}", [python, str(HERE / "side_decode.py")], given)
            sides[engine].go_on(WARM - 1)
        in_turn(list(sides.values()), rounds)
        return figures(size, sides, precision)
    finally:
        for side in sides.values():
            side.end()


def per_token(side: Side) -> list[float]:
    """Seconds of a token, call by call."""
    return [step["seconds"] / step["tokens"] for step in side.steps[side.warm :]]


def figures(size: str, sides: dict[str, Side], precision: str) -> dict[str, Any]:
    """What was measured, for the table."""
    shape, rows = SHAPES[size], PROMPTS * GROUP
    # Libraries are slower at so few rows than the processor need be.
    operations = max(throughput_of(shape, rows, precision), throughput(LARGE, precision))
    least = decode_seconds(shape, rows, BEFORE + NEW / 2, operations, bandwidth())
    seconds = {name: statistics.median(per_token(side)) for name, side in sides.items()}
    found: dict[str, Any] = {
        "workload": "decode",
        "precision": precision,
        "about": {"size": size, "rows": rows, "context": [BEFORE, BEFORE + NEW]},
        "unit": "tokens",
        "rate": {name: 1 / s for name, s in seconds.items()},
        "peak_gib": {name: side.peak for name, side in sides.items()},
        "share": least / (seconds["rlpost"] * rows),
        "least_step_seconds": least,
    }
    if "vllm" in sides:
        found["times"] = {"vLLM": asdict(ratio(per_token(sides["vllm"]), per_token(sides["rlpost"])))}
    return found
