"""The demo on several seeds, and whether each stage repairs what the one before it left.

    python scripts/demo_seeds.py [--seeds 0 1 2] [--runs runs]

Trains `recipes/demo.yaml` once a seed (finished runs are not repeated), prints one table, and judges from the
intervals: DPO above SFT in greedy accuracy and GRPO above DPO in sampled accuracy, each with 95 % intervals apart;
GRPO not below DPO in greedy accuracy, and at least 98 % overall and on problems with a carry. Beside it stands DPO
without its likelihood term, from the same SFT models and pairs. Exit code 1 if a verdict fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from rlpost import console, pipeline
from rlpost.evaluate.evaluator import estimate_from, percent
from rlpost.evaluate.statistics import Estimate
from rlpost.recipe.resolve import resolve

STAGES = ("base", "sft", "dpo", "grpo")


def train(runs: Path, seed: int) -> tuple[dict[str, Any], float | None]:
    """Results by stage, and the seconds of the run if it was not finished before."""
    folder = runs / f"demo_seed{seed}"
    finished = (folder / "grpo" / "DONE").exists()
    start = time.perf_counter()
    pipeline.train(resolve("demo", [f"runs={runs}", f"run={folder.name}", f"seed={seed}"]))
    seconds = None if finished else time.perf_counter() - start
    return {s: json.loads((folder / "evaluation" / f"{s}.json").read_text()) for s in STAGES}, seconds


def without_nll(runs: Path, seed: int) -> dict[str, Any]:
    """DPO's result without its likelihood term, from the same SFT model and the same pairs."""
    folder = runs / f"demo_seed{seed}_without_nll"
    if not folder.exists():
        ignored = shutil.ignore_patterns("dpo*", "grpo*")
        shutil.copytree(runs / f"demo_seed{seed}", folder, ignore=ignored)
    words = [f"runs={runs}", f"run={folder.name}", f"seed={seed}", "stages.dpo.nll_coef=0", "stages.grpo.enabled=false"]
    pipeline.train(resolve("demo", words), allow_change=True)
    result: dict[str, Any] = json.loads((folder / "evaluation" / "dpo.json").read_text())
    return result


def accuracy(result: dict[str, Any], mode: str, part: str = "all") -> Estimate:
    return estimate_from(result[mode]["accuracy"][part])


def verdicts(results: dict[str, Any]) -> dict[str, bool]:
    sft, dpo, grpo = (results[s] for s in STAGES[1:])
    return {
        "dpo > sft, greedy": accuracy(dpo, "greedy").low > accuracy(sft, "greedy").high,
        "grpo > dpo, sampled": accuracy(grpo, "sampled").low > accuracy(dpo, "sampled").high,
        "grpo >= dpo, greedy": accuracy(grpo, "greedy").value >= accuracy(dpo, "greedy").value,
        "grpo >= 98 %": accuracy(grpo, "greedy").value >= 0.98,
        "grpo >= 98 %, carry": accuracy(grpo, "greedy", "carry").value >= 0.98,
    }


def row(seed: int, title: str, result: dict[str, Any]) -> list[str]:
    parts = [("greedy", "all"), ("greedy", "carry"), ("sampled", "all"), ("sampled", "carry")]
    return [str(seed), title, *(percent(accuracy(result, mode, part)) for mode, part in parts)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()
    table: list[list[str]] = []
    judged: list[list[str]] = []
    for seed in given.seeds:
        results, seconds = train(given.runs, seed)
        table += [row(seed, stage, result) for stage, result in results.items()]
        table.append(row(seed, "dpo without nll", without_nll(given.runs, seed)))
        took = "-" if seconds is None else f"{seconds:.0f}"
        judged.append([str(seed), took, *("yes" if ok else "NO" for ok in verdicts(results).values())])
    console.table(
        "demo: held-out accuracy in % [95 % interval], 2,000 problems",
        ["seed", "stage", "greedy", "greedy, carry", "sampled", "sampled, carry"],
        table,
    )
    console.table("verdicts", ["seed", "seconds", *verdicts(results)], judged)
    return int(any("NO" in line for line in judged))


if __name__ == "__main__":
    raise SystemExit(main())
