"""Methods that learn from preference pairs, from one SFT checkpoint and the same pairs: a table and a picture.

    python scripts/compare_pairs.py [--seeds 0 1 2] [--runs runs/compare] [--steps 80] [--jobs 2] [METHOD ...]

The start and its pairs are those of compare_methods.py, made if they are not there; every method of recipes/methods/
that learns from them takes the same number of updates, once a seed (finished runs are not repeated). Then: accuracy on
held-out problems, KL(final || start) in nats a completion, and seconds of processor time (one thread, the reference and
the last evaluation included). Writes pairs.md and pairs.png into the folder of runs. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import yaml
from compare_methods import Run, divergence, draw_ends, spread, start, train_start, write

from rlpost import pipeline
from rlpost.recipe.files import packaged, packaged_folder
from rlpost.recipe.resolve import resolve

HIGHLIGHTED = ("dpo", "ipo", "simpo", "alphapo", "orpo", "apo_zero", "mpo", "triples")
"""In colour, if they are among the methods."""


def of_pairs() -> list[str]:
    """The methods whose recipes extend `on_pairs` and take its pairs."""
    found = []
    for name in sorted(packaged()):
        method = name.removeprefix("methods/")
        recipe = yaml.safe_load((packaged_folder() / f"{name}.yaml").read_text("utf-8")) if method != name else {}
        if recipe.get("defaults") == ["on_pairs"] and "path" not in json.dumps(recipe["stages"]):
            found.append(method)
    return found


def train(given: tuple[Run, Path, int]) -> None:
    """One method, unless it is there already."""
    run, runs, steps = given
    kept = runs / run.name / "cpu_seconds.json"
    if kept.is_file():
        return
    words = [f"runs={runs}", f"run={run.name}", f"seed={run.seed}", "threads=1", f"vars.start={start(runs, run.seed)}"]
    begun = time.process_time()
    pipeline.train(resolve(f"methods/{run.method}", [*words, "stages.dpo.epochs=null", f"stages.dpo.steps={steps}"]))
    kept.write_text(json.dumps(time.process_time() - begun))


def result(runs: Path, run: Run) -> dict[str, float]:
    """What a finished run reached."""
    evaluation = json.loads((runs / run.name / "evaluation" / "dpo.json").read_text("utf-8"))
    last = json.loads((runs / run.name / "dpo" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    return {
        "greedy": evaluation["greedy"]["accuracy"]["all"]["value"],
        "sampled": evaluation["sampled"]["accuracy"]["all"]["value"],
        "kl": divergence(runs, run, "dpo"),
        "preferred": last["accuracy"],
        "seconds": json.loads((runs / run.name / "cpu_seconds.json").read_text("utf-8")),
    }


def table(runs: Path, found: dict[str, list[dict[str, float]]], seeds: int) -> None:
    """On the screen, and as pairs.md."""
    columns = ["method", "greedy %", "sampled %", "pairs preferred %", "KL, nats", "CPU seconds"]
    rows = []
    for title, results in sorted(found.items(), key=lambda item: -fmean(r["sampled"] for r in item[1])):
        by = {key: [r[key] for r in results] for key in results[0]}
        percent = [spread(by[key], 100) for key in ("greedy", "sampled", "preferred")]
        rows.append([title, *percent, spread(by["kl"], digits=2), f"{fmean(by['seconds']):.0f}"])
    write(runs / "pairs.md", columns, rows, seeds)


def picture(runs: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Accuracy against KL, as pairs.png."""
    named = [title for title in HIGHLIGHTED if title in found]
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    draw_ends(axes, {title: found[title] for title in [*(t for t in found if t not in named), *named]}, named)
    for i, title in enumerate(named):
        at = (fmean(r["kl"] for r in found[title]), fmean(r["sampled"] for r in found[title]))
        axes.annotate(title, at, xytext=(5, 4), textcoords="offset points", fontsize=8, color=f"C{i}")
    figure.savefig(runs / "pairs.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=of_pairs())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    runs: Path = given.runs.resolve()
    groups = {method: [Run(method, method, seed) for seed in given.seeds] for method in given.methods}
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        pool.starmap(train_start, [(runs, seed) for seed in given.seeds], chunksize=1)
        pool.map(train, [(run, runs, given.steps) for members in groups.values() for run in members], chunksize=1)
    found = {method: [result(runs, run) for run in members] for method, members in groups.items()}
    table(runs, found, len(given.seeds))
    picture(runs, found)
    print(runs / "pairs.md")


if __name__ == "__main__":
    main()
