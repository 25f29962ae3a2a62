"""What credit over turns is worth: six ways to credit the same episodes, as a table and a picture.

    python scripts/compare_credit.py [--seeds 0 1 2] [--steps 60] [--jobs 2] [--runs runs/credit]

Every way learns recipes/running_sum.yaml from the same SFT model of its seed, with the same number of episodes and of
updates and the same learning rate: the sum of an episode's rewards for all of its turns, the return from each turn on
against the group's, and a critic between tokens or between turns. Table: the share of right turns while training,
by fifths, and of held-out rows at the end. Finished runs are not repeated. Writes table.md and credit.png
(`pip install rlpost[plots]`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

RECIPE = "running_sum"
COLOURS = ("#222222", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#d62728")


class Way(NamedTuple):
    """How turns are credited."""

    stage: str
    words: tuple[str, ...]


WAYS = {
    "whole episodes: leave_one_out": Way("grpo", ("stages.grpo.advantage.fn=leave_one_out",)),
    "turns: turn_leave_one_out": Way("grpo", ("stages.grpo.advantage.fn=turn_leave_one_out",)),
    "turns: turn_normalised": Way("grpo", ("stages.grpo.advantage.fn=turn_normalised",)),
    "turns: process_normalised": Way("grpo", ("stages.grpo.advantage.fn=process_normalised",)),
    "critic, by token": Way("ppo", ("stages.ppo.credit=token",)),
    "critic, by turn": Way("ppo", ("stages.ppo.credit=turn",)),
}


class Found(NamedTuple):
    """What came of a run."""

    rewards: list[float]
    """Of every step."""
    held_out: float
    """Of the final model."""


def train(runs: Path, name: str, words: Sequence[str]) -> Path:
    """Run the recipe's command, unless it has been; returns the run's folder."""
    command = [sys.executable, "-m", "rlpost", "train", RECIPE, f"runs={runs}", f"run={name}", *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return runs / name


def start(runs: Path, seed: int) -> None:
    """The SFT model that all ways of a seed begin with."""
    train(runs, f"start-{seed}", [f"seed={seed}", "stages.grpo.enabled=false", "stages.ppo.enabled=false"])


def learn(runs: Path, name: str, seed: int, steps: int) -> Found:
    """One way from the start of its seed."""
    way = WAYS[name]
    folder = f"{list(WAYS).index(name)}-{seed}"
    if not (runs / folder).exists():
        shutil.copytree(runs / f"start-{seed}", runs / folder)
    other = {"grpo": "ppo", "ppo": "grpo"}[way.stage]
    words = [f"seed={seed}", f"stages.{other}.enabled=false", f"stages.{way.stage}.steps={steps}", *way.words]
    run = train(runs, folder, [*words, "--allow-change"])
    lines = (run / way.stage / "metrics.jsonl").read_text("utf-8").splitlines()
    return Found([json.loads(line)["reward"] for line in lines], held_out(run, way.stage))


def held_out(run: Path, stage: str) -> float:
    """Mean reward of the stage's final model in the run's evaluation, at temperature 1."""
    found = json.loads((run / "evaluation" / f"{stage}.json").read_text("utf-8"))
    return float(found["sampled"]["rewards"]["environment_reward"])


def table(found: dict[tuple[str, int], Found], seeds: Sequence[int], steps: int) -> list[str]:
    """Means over fifths of the run and the evaluation; in a cell, the mean over seeds and its extremes."""
    size = max(1, steps // 5)
    parts = range(0, steps, size)
    lines = [
        f"| steps to | {' | '.join(str(min(part + size, steps)) for part in parts)} | all | held out |",
        f"|---|{'---|' * (len(parts) + 2)}",
    ]
    for name in WAYS:
        runs = [found[name, seed] for seed in seeds]
        cells = [cell([fmean(run.rewards[part : part + size]) for run in runs]) for part in parts]
        cells += [cell([fmean(run.rewards) for run in runs]), cell([run.held_out for run in runs])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(means: Sequence[float]) -> str:
    """Mean [least, most], in percent."""
    return f"{100 * fmean(means):.1f} [{100 * min(means):.1f}, {100 * max(means):.1f}]"


def draw(found: dict[tuple[str, int], Found], seeds: Sequence[int], out: Path) -> None:
    """Means over seeds with the range of seeds, smoothed over five steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, name in zip(COLOURS, WAYS, strict=True):
        curves = [smooth(found[name, seed].rewards) for seed in seeds]
        by_step = list(zip(*curves, strict=True))
        steps = range(1, len(by_step) + 1)
        axes.plot(steps, [fmean(x) for x in by_step], color=colour, linewidth=1.5, label=name)
        axes.fill_between(steps, [min(x) for x in by_step], [max(x) for x in by_step], color=colour, alpha=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("share of right turns")
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=150)


def smooth(curve: Sequence[float]) -> list[float]:
    """Each number averaged with up to four before it."""
    return [fmean(curve[max(0, i - 4) : i + 1]) for i in range(len(curve))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/credit"))
    args = parser.parse_args()
    runs = args.runs.resolve()
    runs.mkdir(parents=True, exist_ok=True)
    each = [(name, seed) for seed in args.seeds for name in WAYS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: start(runs, seed), args.seeds))
        ended = pool.map(lambda one: learn(runs, *one, args.steps), each)
        found = dict(zip(each, ended, strict=True))
    lines = table(found, args.seeds, args.steps)
    (runs / "table.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    draw(found, args.seeds, runs / "credit.png")


if __name__ == "__main__":
    main()
