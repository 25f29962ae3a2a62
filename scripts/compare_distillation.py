"""On-policy distillation against imitation of the teacher's samples, on as many tokens: a table and a picture.

    python scripts/compare_distillation.py [--seeds 0 1 2] [--steps 150] [--jobs 2] [--runs runs/distillation]

The teacher and the student's start are those of recipes/distill_teacher.yaml and recipes/distill.yaml, once a seed.
From that start every way takes the same number of steps on the same number of completions: of the student, which the
teacher corrects, or of the teacher, whose tokens or distributions are imitated. Table: accuracy on held-out problems,
KL(student || teacher) of completions, tokens trained on, seconds of processor time (one thread, the evaluations
included). Finished runs are not repeated. Writes table.md and distillation.png (`pip install rlpost[plots]`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from compare_methods import spread, write

from rlpost import pipeline
from rlpost.data.codec import make_codec
from rlpost.data.formats import Format, encode
from rlpost.data.tasks.addition import held_out, train
from rlpost.engine.collect import collect
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.recipe.resolve import resolve
from rlpost.types import Group, completions

COMPLETIONS = 512
"""A step."""
SAMPLING = {"max_new_tokens": 5}
ON_POLICY: dict[str, Any] = {
    "kind": "distill",
    "data": {"problems": {"task": {"fn": "addition.train"}}},
    "prompts_per_step": COMPLETIONS // 4,
    "group_size": 4,
    "sampling": SAMPLING,
    "rewards": [{"fn": "addition.correct"}],
    "table_every": 0,
}
IMITATED: dict[str, Any] = {"kind": "sft", "data": {"samples": {"path": "samples.jsonl"}}, "batch_size": COMPLETIONS}
WAYS: dict[str, dict[str, Any]] = {
    "distill, reverse_kl": {**ON_POLICY},
    "distill, reverse_kl, credit: completion": {**ON_POLICY, "credit": "completion", "weight": "sequence_sum"},
    "distill, reverse_kl, top_k: 3": {**ON_POLICY, "top_k": 3},
    "distill, forward_kl": {**ON_POLICY, "loss": {"fn": "forward_kl"}},
    "distill, sampled tokens alone": {**ON_POLICY, "estimate": "sampled"},
    "sft on the teacher's samples": IMITATED,
    "sft on them, by distributions (forward_kl)": {**IMITATED, "loss": {"fn": "forward_kl"}},
    "distill, reverse_kl, one sample a prompt": {**ON_POLICY, "prompts_per_step": COMPLETIONS, "group_size": 1},
}
COLOURS = ("#1f77b4", "#2ca02c", "#17becf", "#9467bd", "#8c564b", "#ff7f0e", "#d62728", "#000000")


def folder(runs: Path, way: str, seed: int) -> Path:
    return runs / f"{list(WAYS).index(way)}-{seed}"


def begin(runs: Path, seed: int, steps: int) -> None:
    """The teacher and the student of a seed, and the teacher's samples."""
    words = [f"runs={runs}", f"seed={seed}", "threads=1"]
    teacher = pipeline.train(resolve("distill_teacher", [*words, f"run=teacher-{seed}"]))
    pipeline.train(resolve("distill", [*words, f"run=start-{seed}", "stages.distill.enabled=false"]))
    file = runs / f"samples-{seed}.jsonl"
    if file.is_file():
        return
    # No problem twice before all have been had, and a new sample each time.
    problems = list(train())
    rounds = -(-steps * COMPLETIONS // len(problems))
    groups = sampled(load_policy(teacher, Model(), trainable=False), problems, rounds, seed)
    rows = [
        {"prompt": group.example["prompt"], "completion": group.completions[i].text}
        for i in range(rounds)
        for group in groups
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["completion"]), "utf-8")


def sampled(policy: Policy, rows: Sequence[Any], size: int, seed: int) -> list[Group]:
    codec = make_codec(policy.tokenizer)
    prompts = [encode(row, Format.prompt, codec, "addition") for row in rows]
    return collect(frozen_engine(policy), prompts, size, Sampling(**SAMPLING), seed=seed)


def learn(given: tuple[Path, str, int, int]) -> None:
    """One way from the start of its seed."""
    runs, way, seed, steps = given
    own = folder(runs, way, seed)
    kept = own / "cpu_seconds.json"
    if kept.is_file():
        return
    stage = {**WAYS[way], "steps": steps, "learning_rate": 5e-4, "max_length": 16, "max_tokens_per_microbatch": 16384}
    if stage["kind"] == "distill" or "loss" in stage:
        stage["teacher"] = str(runs / f"teacher-{seed}")
    if stage["kind"] == "sft":
        stage["data"] = {"samples": {"path": str(runs / f"samples-{seed}.jsonl")}}
    recipe = {
        "run": own.name,
        "runs": str(runs),
        "seed": seed,
        "threads": 1,
        "model": {"path": str(runs / f"start-{seed}"), "precision": "float32"},
        "stages": {"student": stage},
        "evaluation": {
            "data": {"held_out": {"task": {"fn": "addition.held_out"}}},
            "rewards": [{"fn": "addition.correct"}],
            "sampling": SAMPLING,
            "batch": 2000,
            "show": 0,
            "every": max(1, steps // 10),
        },
    }
    file = runs / f"{own.name}.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False), "utf-8")
    begun = time.process_time()
    pipeline.train(resolve(str(file), []))
    kept.write_text(json.dumps(time.process_time() - begun))


def result(runs: Path, way: str, seed: int) -> dict[str, float]:
    """What a finished run reached."""
    own = folder(runs, way, seed)
    evaluation = json.loads((own / "evaluation" / "student.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (own / "student" / "metrics.jsonl").read_text("utf-8").splitlines()]
    tokens = sum(line.get("tokens", line.get("length", 0.0) * COMPLETIONS) for line in lines)
    return {
        "greedy": evaluation["greedy"]["accuracy"]["all"]["value"],
        "sampled": evaluation["sampled"]["accuracy"]["all"]["value"],
        "kl": divergence(runs, own, seed),
        "tokens": tokens,
        "seconds": json.loads((own / "cpu_seconds.json").read_text()),
    }


def divergence(runs: Path, own: Path, seed: int) -> float:
    """KL(student || teacher) in nats a completion, by one sample of each held-out problem; kept beside the run."""
    kept = own / "divergence.json"
    if not kept.is_file():
        student = load_policy(own / "student" / "final", Model(), trainable=False)
        teacher = load_policy(runs / f"teacher-{seed}" / "sft" / "final", Model(), trainable=False)
        groups = sampled(student, list(held_out()), 1, seed)
        apart = (logprobs(student, groups) - logprobs(teacher, groups)).sum()
        kept.write_text(json.dumps(float(apart) / len(completions(groups))))
    return float(json.loads(kept.read_text()))


def table(runs: Path, found: dict[str, list[dict[str, float]]], seeds: int) -> None:
    columns = ["way", "greedy %", "sampled %", "KL to the teacher, nats", "tokens", "CPU seconds"]
    rows = []
    for way, results in found.items():
        by = {key: [r[key] for r in results] for key in results[0]}
        rows.append(
            [
                way,
                spread(by["greedy"], 100),
                spread(by["sampled"], 100),
                spread(by["kl"], digits=3),
                f"{fmean(by['tokens']):.0f}",
                f"{fmean(by['seconds']):.0f}",
            ]
        )
    write(runs / "table.md", columns, rows, seeds)


def draw(runs: Path, seeds: Sequence[int]) -> None:
    """Accuracy of greedy answers to held-out problems while the students train: means over seeds, and their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, way in zip(COLOURS, WAYS, strict=True):
        curves = []
        for seed in seeds:
            text = (folder(runs, way, seed) / "student" / "evaluations.jsonl").read_text("utf-8")
            curves.append([json.loads(line) for line in text.splitlines()])
        steps = [line["step"] for line in curves[0]]
        values = list(zip(*([line["greedy/accuracy"] for line in curve] for curve in curves), strict=True))
        axes.plot(steps, [fmean(v) for v in values], color=colour, label=way, lw=1.8)
    axes.set(xlabel=f"steps of {COMPLETIONS} completions", ylabel="accuracy of greedy answers, held out")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(runs / "distillation.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"))
    given = parser.parse_args()
    runs: Path = given.runs.resolve()
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        pool.starmap(begin, [(runs, seed, given.steps) for seed in given.seeds], chunksize=1)
        pool.map(learn, [(runs, way, seed, given.steps) for seed in given.seeds for way in WAYS], chunksize=1)
    found = {way: [result(runs, way, seed) for seed in given.seeds] for way in WAYS}
    table(runs, found, len(given.seeds))
    draw(runs, given.seeds)
    print(runs / "table.md")


if __name__ == "__main__":
    main()
