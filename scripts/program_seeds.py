"""The recipe `programs` on several seeds: what passes before and after GRPO, by kind, and how the reward rises.

    python scripts/program_seeds.py [--seeds 0 1 2] [--runs runs] [OVERRIDE ...]

Trains `recipes/programs.yaml` once a seed (finished runs are not repeated) and prints two Markdown tables: the share of
held-out problems whose tests all pass, and GRPO's mean reward and the share of its time that the sandbox took. Exit
code 1 where greedy answers pass more than 30 % of the time after SFT, or less than 90 % after GRPO.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from rlpost import pipeline
from rlpost.data.tasks.programs import KINDS
from rlpost.recipe.resolve import resolve

STAGES = ("sft", "grpo")
MOST_BEFORE, LEAST_AFTER = 0.3, 0.9
BY = 5
"""Steps of which the second table gives a mean."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given, overrides = parser.parse_known_args()
    passed: list[list[str]] = []
    curves: list[list[str]] = []
    failed = False
    for seed in given.seeds:
        folder = given.runs / f"programs_seed{seed}"
        words = [f"runs={given.runs}", f"run={folder.name}", f"seed={seed}", *overrides]
        pipeline.train(resolve("programs", words))
        found = {stage: json.loads((folder / "evaluation" / f"{stage}.json").read_text()) for stage in STAGES}
        for stage, result in found.items():
            shares = [share(result, "greedy", part) for part in ("all", *KINDS)]
            passed.append([str(seed), stage, *map(percent, [*shares, share(result, "sampled", "all")])])
        before, after = (share(found[stage], "greedy", "all") for stage in STAGES)
        failed |= before > MOST_BEFORE or after < LEAST_AFTER
        curves.append([str(seed), *curve(folder / "grpo")])
    table(["seed", "after", "greedy", *KINDS, "sampled"], passed)
    table(["seed", *(f"to step {BY * (i + 1)}" for i in range(len(curves[0]) - 2)), "scoring"], curves)
    return int(failed)


def share(result: dict[str, Any], mode: str, part: str) -> float:
    return float(result[mode]["accuracy"][part]["value"])


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def curve(stage: Path) -> list[str]:
    """The mean reward of each `BY` steps, and the share of the time that was spent on rewards."""
    metrics, timings = ([json.loads(line) for line in (stage / f"{n}.jsonl").open()] for n in ("metrics", "timings"))
    rewards = [float(line["reward"]) for line in metrics]
    steps = [fmean(rewards[i : i + BY]) for i in range(0, len(rewards), BY)]
    scoring, seconds = (sum(line[name] for line in timings) for name in ("scoring", "seconds"))
    return [*(f"{value:.2f}" for value in steps), percent(scoring / seconds)]


def table(head: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
