"""What sampling ahead of training gains in time, and what it costs in reward: a table and a picture.

    python scripts/ahead.py [--seeds 0 1 2] [--steps 100] [--rounds 3] [--timed 12] [--runs runs/ahead]

Two workloads. `addition`: GRPO of recipes/demo.yaml from its SFT model. `environment`: GRPO of a model of 25 million
weights, four passes over 16 episodes of recipes/calculator.yaml's kind, whose environment takes a random time for each
reply, many at once: lognormal, half a second on average.

Times: the mean seconds of a step, of `--timed` steps after the first ones (filling what is ahead, and loading), by
staleness 0, 1 and 4 in turn, `--rounds` times; printed is the median of each round's ratio to staleness 0 on one
thread. Learner and sampler have a thread each; staleness 0 is also given two. Curves: reward by step of the addition,
for every seed and staleness, as a table of means over tenths of the run and as ahead.png (`pip install rlpost[plots]`).
Run it on a quiet machine: finished curves are not repeated, times are taken anew. Writes table.md too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

STALENESS = (0, 1, 4)
SETTINGS = {"0, one thread": (0, 1), "0, two threads": (0, 2), "1": (1, 2), "4": (4, 2)}
"""Name -> staleness, and threads of the whole run."""
SLOW = """\
import asyncio
import math
import random

from rlpost.data.tasks import calculator

MEAN, SPREAD = 0.5, 0.8


async def reply(text, turns):
    if len(turns) == 1:
        await asyncio.sleep(random.lognormvariate(math.log(MEAN) - SPREAD**2 / 2, SPREAD))
    return calculator.reply(text, turns)


def odd(completion):
    return sum(sign in "13579" for sign in completion.text)
"""
LARGE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def train(recipe: str, runs: Path, name: str, words: Sequence[str]) -> Path:
    """Run the recipe's command, unless it has been; returns the run's folder."""
    run = runs / name
    command = [sys.executable, "-m", "rlpost", "train", recipe, f"runs={runs}", f"run={name}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=runs)  # where slow.py is
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return run


def begun(runs: Path, seed: int, name: str) -> None:
    """A run of the demo that has its SFT model, a copy of one that is made once a seed."""
    words = [f"seed={seed}", "evaluation=null", *(f"stages.{name}.enabled=false" for name in ("pairs", "dpo", "grpo"))]
    made = train("demo", runs, f"start-{seed}", words)
    if not (runs / name).exists():
        shutil.copytree(made, runs / name)


def addition(seed: int, staleness: int, threads: int, steps: int) -> list[str]:
    """GRPO of the demo, in a run that has begun."""
    return [
        f"seed={seed}",
        f"threads={threads}",
        "evaluation=null",
        *(f"stages.{name}.enabled=false" for name in ("pairs", "dpo")),
        f"stages.grpo.steps={steps}",
        f"rollouts={{staleness: {staleness}}}",
        "--allow-change",
    ]


def environment(file: Path, staleness: int, threads: int, steps: int) -> list[str]:
    """GRPO of a larger model with the slow environment."""
    return [
        f"threads={threads}",
        *(f"model.config.{key}={value}" for key, value in LARGE.items()),
        "evaluation=null",
        *(f"stages.{name}.enabled=false" for name in ("sft", "ppo")),
        f"stages.grpo.environment={{fn: '{file}:reply'}}",
        f"stages.grpo.rewards=[{{fn: '{file}:odd'}}]",
        *("stages.grpo.prompts_per_step=4", "stages.grpo.group_size=4", "stages.grpo.num_iterations=4"),
        f"stages.grpo.steps={steps}",
        f"rollouts={{staleness: {staleness}}}",
    ]


def seconds(run: Path, first: int) -> float:
    """Mean seconds of a step from step number `first` on."""
    lines = [json.loads(line) for line in (run / "grpo/timings.jsonl").read_text("utf-8").splitlines()]
    return fmean(line["seconds"] for line in lines[first:])


def times(runs: Path, rounds: int, timed: int) -> list[str]:
    """A table of both workloads."""
    file = runs / "slow.py"
    file.write_text(SLOW, "utf-8")
    first = max(STALENESS) + 2
    lines = [f"| | {' | '.join(SETTINGS)} |", f"|---|{'---|' * len(SETTINGS)}"]
    for workload, recipe in (("addition", "demo"), ("environment", "calculator")):
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(rounds):
            for name, (staleness, threads) in SETTINGS.items():
                steps = first + timed
                shutil.rmtree(runs / "timed", ignore_errors=True)
                if workload == "addition":
                    begun(runs, 0, "timed")
                    words = addition(0, staleness, threads, steps)
                else:
                    words = environment(file, staleness, threads, steps)
                found[name].append(seconds(train(recipe, runs, "timed", words), first))
        alone = found["0, one thread"]
        ratios = {name: median(one / own for one, own in zip(alone, of, strict=True)) for name, of in found.items()}
        cells = [f"{median(found[name]):.3g} s, {ratios[name]:.2f} times as fast" for name in SETTINGS]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return lines


def rewards(runs: Path, seeds: Sequence[int], steps: int) -> dict[tuple[int, int], list[float]]:
    """(staleness, seed) -> the reward of every step of the addition."""
    found = {}
    for seed in seeds:
        for staleness in STALENESS:
            run = runs / f"grpo-{staleness}-{seed}"
            begun(runs, seed, run.name)
            train("demo", runs, run.name, addition(seed, staleness, 2 if staleness else 1, steps))
            lines = (run / "grpo/metrics.jsonl").read_text("utf-8").splitlines()
            found[staleness, seed] = [json.loads(line)["reward"] for line in lines]
    return found


def tenths(curves: dict[tuple[int, int], list[float]], seeds: Sequence[int], steps: int) -> list[str]:
    """A table of means over tenths of the run; in a cell, the mean over seeds and its extremes."""
    size = max(1, steps // 10)
    parts = range(0, steps, size)
    lines = [
        f"| steps to | {' | '.join(str(min(part + size, steps)) for part in parts)} |",
        f"|---|{'---|' * len(parts)}",
    ]
    for staleness in STALENESS:
        cells = []
        for part in parts:
            means = [fmean(curves[staleness, seed][part : part + size]) for seed in seeds]
            cells.append(f"{fmean(means):.3f} [{min(means):.3f}, {max(means):.3f}]")
        lines.append(f"| staleness {staleness} | {' | '.join(cells)} |")
    return lines


def draw(curves: dict[tuple[int, int], list[float]], seeds: Sequence[int], out: Path) -> None:
    """The curves, smoothed over five steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for colour, staleness in zip(("#222222", "#1f77b4", "#d62728"), STALENESS, strict=True):
        for seed in seeds:
            curve = curves[staleness, seed]
            smooth = [fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]
            label = f"staleness {staleness}" if seed == seeds[0] else None
            axes.plot(range(1, len(curve) + 1), smooth, color=colour, alpha=0.7, linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("reward")
    axes.legend()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of a curve")
    parser.add_argument("--rounds", type=int, default=3, help="in which every setting is timed")
    parser.add_argument("--timed", type=int, default=12, help="steps that are timed")
    parser.add_argument("--runs", type=Path, default=Path("runs/ahead"))
    args = parser.parse_args()
    runs = args.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    curves = rewards(runs, args.seeds, args.steps)
    lines = [*times(runs, args.rounds, args.timed), "", *tenths(curves, args.seeds, args.steps)]
    (runs / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    draw(curves, args.seeds, runs / "ahead.png")


if __name__ == "__main__":
    main()
