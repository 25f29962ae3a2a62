"""How seconds and memory grow with each size of the work, one size at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gate import BenchError
from pairs import HERE, start
from workload import SHAPES, Lengths, make_model, make_rows, write_rows

BASE = {"prompts": 4, "group": 4, "prompt": 64, "completion": 64, "new": 64}
"""Everything but the size that grows; the model is the 6M one."""
AXES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "update, completions a prompt": ("learning", "group", (2, 8, 32, 64)),
    "update, prompt tokens": ("learning", "prompt", (32, 128, 512, 2048)),
    "update, completion tokens": ("learning", "completion", (32, 128, 512, 2048)),
    "update, vocabulary": ("learning", "vocab_size", (1024, 4096, 16384, 65536)),
    "sampling, completions a prompt": ("sampling", "group", (2, 8, 32, 64)),
    "sampling, prompt tokens": ("sampling", "prompt", (32, 128, 512, 2048)),
    "sampling, new tokens": ("sampling", "new", (32, 128, 512)),
}
"""(what is measured, the size that grows, its values)."""
ROWS = (100, 10_000, 1_000_000)
STEPS = (10, 100, 1000)


def growth(folder: Path, kept: Path, small: bool = False) -> dict[str, Any]:
    """All axes; `small` takes the first two values of each, for a quick look."""
    lines = []
    for name, (what, size, values) in AXES.items():
        found = [_point(kept, what, size, value) for value in (values[:2] if small else values)]
        lines.append({"axis": name, "values": list(values[: len(found)]), **_columns(found)})
        _say(lines[-1])
    sizes = list(SHAPES)[: 2 if small else None]
    found = [_point(kept, "learning", "model", 0, model) for model in sizes]
    lines.append({"axis": "update, parameters", "values": [_parameters(s) for s in sizes], **_columns(found)})
    _say(lines[-1])
    rows = ROWS[: 2 if small else None]
    found = [_until_first_step(folder / f"rows-{n}", kept, n) for n in rows]
    lines.append({"axis": "rows, until the first step", "values": list(rows), **_columns(found)})
    _say(lines[-1])
    lines.append(_over_steps(folder / "steps", kept, STEPS[: 2 if small else None]))
    _say(lines[-1])
    return {"workload": "growth", "about": BASE, "lines": lines}


def exponents(values: list[float], seconds: list[float]) -> list[float]:
    """Between neighbours: log of the seconds' ratio by log of the sizes' ratio; 1 is linear, 2 quadratic."""
    pairs = zip(values, values[1:], seconds, seconds[1:], strict=False)
    return [math.log(after / before) / math.log(b / a) for a, b, before, after in pairs]


def _columns(found: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [point[key] for point in found] for key in ("seconds", "peak_gib")}


def _say(line: dict[str, Any]) -> None:
    shown = [f"{v:,}: {s:.2f} s {m:.2f} GiB" for v, s, m in zip(*_three(line), strict=True)]
    print(f"  {line['axis']}: {', '.join(shown)}", file=sys.stderr, flush=True)


def _three(line: dict[str, Any]) -> tuple[list[Any], list[float], list[float]]:
    return line["values"], line["seconds"], line["peak_gib"]


def _parameters(size: str) -> int:
    from limit import body_parameters

    return body_parameters(SHAPES[size]) + SHAPES[size]["hidden_size"] * SHAPES[size]["vocab_size"]


def _point(kept: Path, what: str, size: str, value: int, model: str = "6M") -> dict[str, float]:
    changes = {size: value} if size == "vocab_size" else {}
    name = f"model-{model}" + (f"-{value}" if changes else "")
    point = {**BASE, "what": what, "model": str(make_model(kept / name, model, **changes))}
    if size in BASE:
        point[size] = value
    if what == "sampling":
        point["completion"] = 1
    done = subprocess.run(
        [sys.executable, str(HERE / "growth_point.py"), json.dumps(point)],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BenchError(f"growth: {what} with {size}={value}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _until_first_step(folder: Path, kept: Path, rows: int) -> dict[str, float]:
    """Reading and encoding rows of about 16 tokens, loading the smallest model, and one update."""
    folder.mkdir(parents=True)
    file = folder / "rows.jsonl"
    some = make_rows("sft", min(rows, 10_000), Lengths(8, 8, 0.2), SHAPES["0.65M"]["vocab_size"])
    write_rows(file, "sft", some * (rows // len(some)))
    work = {
        "kind": "sft",
        "rows": str(file),
        "model": str(make_model(kept / "model-0.65M", "0.65M")),
        "steps": 2,
        "batch": 16,
        "learning_rate": 1e-4,
        "precision": "float32",
        "folder": str(folder),
    }
    side = start(f"growth: {rows} rows", [sys.executable, str(HERE / "side_rlpost.py")], work)
    side.end()
    return {"seconds": side.steps[0]["seconds"], "peak_gib": side.peak}


def _over_steps(folder: Path, kept: Path, steps: tuple[int, ...]) -> dict[str, Any]:
    """GRPO steps of the smallest model: seconds of one, and the memory it has by then."""
    folder.mkdir(parents=True)
    file = folder / "rows.jsonl"
    write_rows(file, "grpo", make_rows("grpo", 512, Lengths(8, 5, 0.2), SHAPES["0.65M"]["vocab_size"]))
    work = {
        "kind": "grpo",
        "rows": str(file),
        "model": str(make_model(kept / "model-0.65M", "0.65M")),
        "steps": steps[-1] + 1,
        "batch": 4,
        "group": 4,
        "most": 8,
        "learning_rate": 1e-6,
        "precision": "float32",
        "folder": str(folder),
    }
    side = start("growth: steps", [sys.executable, str(HERE / "side_rlpost.py")], work)
    try:
        side.go_on(steps[-1] - 1)
    finally:
        side.end()
    found = [
        {
            "seconds": sorted(s["seconds"] for s in side.steps[n // 2 : n])[n // 4],
            "peak_gib": side.steps[n - 1]["peak_gib"],
        }
        for n in steps
    ]
    return {"axis": "GRPO, steps done", "values": list(steps), **_columns(found)}
