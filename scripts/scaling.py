"""What one process and two cost a step: seconds of SFT and GRPO, and how they shrink or stay. Needs two idle cores.

    python scripts/scaling.py                   # seven minutes; a table in markdown
    python scripts/scaling.py --repeats 1 --steps 3

Runs of the command line, each process on one thread, one after another in turn, `repeats` times around. A step's time
is that between lines of its log, so it has everything in it. Numbers are medians over the rounds: of a step, and of
its ratio to the same round's run on one process.

strong: two processes share the update of one. weak: they share an update twice as large. torchrun: one process that
torchrun started.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MODELS: dict[str, dict[str, Any]] = {
    "11M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
}
SIZES = {"sft": 8, "grpo": 4}
"""Rows, or prompts of four completions, of an update."""
STEPS = {"11M": 6, "tiny": 150}
WARM = 2
"""Steps that are not counted."""
LONGEST = 300.0


class Way(NamedTuple):
    """How a run is started, and how large its update is."""

    name: str
    launcher: tuple[str, ...] = ()
    processes: int = 1
    times: int = 1


ALONE = Way("one process")
TORCHRUN = Way("torchrun", ("torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"))
STRONG = Way("strong", processes=2)
WEAK = Way("weak", processes=2, times=2)


def stage(kind: str, size: int, steps: int) -> dict[str, Any]:
    common = {
        "kind": kind,
        "data": {"rows": {"path": "rows.jsonl"}},
        "steps": steps,
        "checkpoint_every": steps,
        "learning_rate": 1e-4,
    }
    if kind == "sft":
        return {**common, "batch_size": size, "max_length": 128, "max_tokens_per_microbatch": 4096}
    return {
        **common,
        "prompts_per_step": size,
        "group_size": 4,
        "sampling": {"max_new_tokens": 64},
        "rewards": [{"fn": "pattern", "args": {"regex": "^[0-4]"}}],
        "table_every": steps,
    }


def write(folder: Path, model: str, kind: str, way: Way, steps: int) -> Path:
    config = {"model_type": "llama", "max_position_embeddings": 128, **MODELS[model]}
    config["num_key_value_heads"] = config["num_attention_heads"]
    tokenizer = {"kind": "characters", "alphabet": "0123456789+="}
    recipe = {
        "run": f"{model}-{kind}-{way.name}".replace(" ", "-"),
        "runs": str(folder / "runs"),
        "threads": 1,
        "model": {"config": config, "tokenizer": tokenizer, "precision": "float32"},
        "parallel": {"processes": way.processes},
        "stages": {"stage": stage(kind, SIZES[kind] * way.times, steps)},
    }
    file = folder / f"{recipe['run']}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    return file


def write_rows(file: Path) -> None:
    """Long sums, all of one length, so that shares are equal."""
    chance = random.Random(1)
    rows = [
        {"prompt": f"{chance.randrange(10**8):08}=", "completion": "".join(chance.choices("0123456789", k=110))}
        for _ in range(256)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def seconds_a_step(recipe: Path, way: Way, steps: int, number: int) -> float:
    """Of one run, from line `WARM` of its log to the last one."""
    run = f"{recipe.stem}-{number}"
    command = [sys.executable, "-m", *way.launcher, "rlpost", "train", str(recipe), f"run={run}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    log = recipe.parent / "runs" / run / "stage/metrics.jsonl"
    began: tuple[int, float] | None = None
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        if began is None and lines >= WARM:
            began = lines, time.perf_counter()
        if began is not None and lines == steps:
            ended = time.perf_counter()
            process.communicate()
            return (ended - began[1]) / (steps - began[0])
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    raise RuntimeError(process.communicate()[1])


def measured(folder: Path, model: str, kind: str, ways: Sequence[Way], repeats: int, steps: int) -> list[str]:
    """Rows of the table: each way's seconds, and its ratio to one process."""
    recipes = {way.name: write(folder, model, kind, way, steps) for way in ways}
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    for number in range(repeats):
        for way in ways if number % 2 == 0 else reversed(ways):
            found[way.name].append(seconds_a_step(recipes[way.name], way, steps, number))
    lines = []
    for way in ways:
        ratios = [there / here for here, there in zip(found[ALONE.name], found[way.name], strict=True)]
        milliseconds = 1e3 * statistics.median(found[way.name])
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        speedup = way.times / statistics.median(ratios)
        lines.append(
            f"| {kind} | {model} | {way.name} | {milliseconds:.1f} | {statistics.median(ratios):.3f} ({spread}) | "
            f"{speedup:.2f} | {100 * speedup / way.processes:.0f} % |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, help="of every run; more for tiny models by default")
    args = parser.parse_args()
    lines = [
        "| stage | model | way | ms a step | ratio to one process (least to largest) | speedup | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name, "rows.jsonl"))
        for model in MODELS:
            for kind in SIZES:
                ways = [ALONE, STRONG]
                ways += [WEAK] if model != "tiny" else []
                ways += [TORCHRUN] if kind == "sft" else []
                steps = args.steps or STEPS[model]
                lines += measured(Path(name), model, kind, ways, args.repeats, steps)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
