"""On-policy methods from one SFT checkpoint with one budget of samples: a table and pictures.

    python scripts/compare_methods.py [--newer] [--seeds 0 1 2] [--runs runs/compare] [--samples 30720] [METHOD ...]

Trains the start and every method of recipes/methods/ on the demo's addition, once a seed (finished runs are not
repeated), each with as many samples as the others, those of fresh rollouts and of replaced prompts included. Then:
accuracy on held-out problems, the KL that was spent from the start, seconds of processor time (one thread, the last
evaluation included); the reward against samples; PPO at
λ = 0, .95 and 1; and for leave-one-out REINFORCE the frontier of reward against KL over four β. Writes table.md,
methods.png, gae.png and frontier.png into the folder of runs; with --newer, of later methods beside three that they
descend from, newer.md and newer.png. Needs matplotlib (`pip install rlpost[plots]`).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from rlpost import console, pipeline
from rlpost.data.codec import make_codec
from rlpost.data.formats import Format, encode
from rlpost.data.tasks.addition import held_out
from rlpost.engine.collect import collect
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.score import logprobs
from rlpost.recipe.resolve import resolve
from rlpost.types import completions

METHODS = (
    *("reinforce", "reinforce_mean", "reinforce_pp", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "gmpo"),
    *("sapo", "dppo", "remax", "opo", "maxrl", "pass_at_k", "gpg", "gdpo", "process", "vineppo", "ppo", "trpo"),
    "online_dpo",
)
ANCESTORS = ("rloo", "grpo", "cispo")
"""In the table of newer methods too: it was made by itself, and these lead from one to the other."""
NEWER = (
    *("vespo", "luspo", "topr", "deepseek_v32", "dppo_kl", "mirror_descent", "mirror_descent_soft", "top_entropy"),
    *("fipo", "turn_rloo", "gigpo", "clip_cov", "kl_cov", "adaptive_entropy", "m2po", "optimal_token", "a_star_po"),
    *("role_baseline", "target_po", "xpo", "nash_md", "chord", "chord_phi", "on_policy_distillation"),
)
UPDATES = (2, 4, 8)
"""Of GRPO, a batch: as many as its later relatives take, so that these are seen for themselves."""
LAMBDAS = (0.0, 0.95, 1.0)
PPO_LAMBDA = 0.95
"""Of recipes/methods/ppo.yaml."""
BETAS = (0.01, 0.1, 0.3, 1.0)
DIGITS = 4
"""Actions of an answer: three digits and the end."""


@dataclass(frozen=True)
class Run:
    """One training."""

    title: str
    method: str
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.title.replace(' ', '_').replace('=', '')}_seed{self.seed}"

    def folder(self, runs: Path) -> Path:
        """Where it is kept."""
        return runs / self.name


def start(runs: Path, seed: int) -> Path:
    return runs / f"start_seed{seed}"


def train_start(runs: Path, seed: int) -> None:
    words = [f"runs={runs}", f"run=start_seed{seed}", f"seed={seed}", "threads=1", "evaluation=null"]
    pipeline.train(resolve("methods/start", words))


def train(given: tuple[Run, Path, int]) -> None:
    """One method on its budget."""
    run, runs, samples = given
    words = [f"runs={runs}", f"run={run.name}", f"seed={run.seed}", "threads=1", f"vars.start={start(runs, run.seed)}"]
    words += ["evaluation.every_stage=true", *of_another_run(run, runs), *run.overrides]
    stages = resolve(f"methods/{run.method}", words).config.stages
    stage = stages["rl"]
    steps = max(1, round((samples - before(stages)) / samples_a_step(stage)))
    kept = run.folder(runs) / "cpu_seconds.json"
    while not kept.is_file():
        begun = time.process_time()
        pipeline.train(resolve(f"methods/{run.method}", [*words, f"stages.rl.steps={steps}"]))
        within = sum(spent <= samples for spent in curve(runs, run)[0])
        if within == steps or samples_a_step(stage) > samples:
            kept.write_text(json.dumps(time.process_time() - begun))
        else:
            # Prompts drawn again cost more than the budget: the same run, only as far as it reaches.
            shutil.rmtree(run.folder(runs))
            steps = within


def of_another_run(run: Run, runs: Path) -> list[str]:
    """Overrides that name what a method learns from besides: rollouts of `rloo`, which keeps them, or its policy."""
    if run.method == "rloo":
        return ["stages.rl.table_every=1"]
    source = Run("rloo", "rloo", run.seed).folder(runs)
    known = {"recorded": source / "rl" / "rollouts", "teacher": source}
    return [f"vars.{name}={known[name]}" for name in needed(run.method)]


def needed(method: str) -> list[str]:
    """The variables of its recipe that are of another run."""
    variables = resolve(f"methods/{method}", []).config.vars
    return [name for name in ("recorded", "teacher") if name in variables]


def before(stages: Mapping[str, Any]) -> int:
    """Completions that stages before the one that learns have sampled, to learn what its prompts are worth."""
    return sum(stage.prompts * stage.group_size for stage in stages.values() if stage.kind == "pairs")


def samples_a_step(stage: Any) -> float:
    """Completions sampled a step: the groups, those they meet, greedy ones, fresh rollouts from every state.

    Prompts drawn again are counted as they come, in `curve`.
    """
    own = stage.prompts_per_step * stage.group_size
    if getattr(stage, "against", None) is not None:
        own *= 2
    advantage = getattr(stage, "advantage", None)
    if advantage is not None and advantage.fn == "greedy_baseline":
        own += stage.prompts_per_step
    if advantage is not None and advantage.fn == "monte_carlo_values":
        # The prompt's state is tried once, others once a completion where all differ: an upper bound.
        own += stage.prompts_per_step * (1 + stage.group_size * (DIGITS - 2)) * stage.fresh_rollouts
    return own


def curve(runs: Path, run: Run) -> tuple[list[float], list[float]]:
    """Samples so far, and the mean reward (share of right answers) of a step's samples."""
    stages = resolve(str(run.folder(runs) / "config.resolved.yaml"), []).config.stages
    stage = stages["rl"]
    samples, rewards, total = [], [], float(before(stages))
    for line in map(json.loads, (run.folder(runs) / "rl" / "metrics.jsonl").read_text().splitlines()):
        total += samples_a_step(stage) * line.get("drawn", stage.prompts_per_step) / stage.prompts_per_step
        samples.append(total)
        rewards.append(line.get("drawn/correct", line.get("reward/correct", line["reward"])))
    return samples, rewards


def result(runs: Path, run: Run, samples: int) -> dict[str, float]:
    """What a finished run reached, at the budget's end."""
    evaluation = json.loads((run.folder(runs) / "evaluation" / "rl.json").read_text())
    spent, rewards = curve(runs, run)
    inside = [r for s, r in zip(spent, rewards, strict=True) if s <= samples]
    # Recorded samples are another policy's, and so are their rewards.
    own = "recorded" not in needed(run.method)
    return {
        "greedy": evaluation["greedy"]["accuracy"]["all"]["value"],
        "sampled": evaluation["sampled"]["accuracy"]["all"]["value"],
        "area": fmean(inside or rewards) if own else math.nan,
        "samples": spent[-1],
        "kl": divergence(runs, run),
        "seconds": json.loads((run.folder(runs) / "cpu_seconds.json").read_text()),
    }


def divergence(runs: Path, run: Run, stage: str = "rl") -> float:
    """KL(final || start) in nats a completion, by one sample of each held-out problem; kept beside the run."""
    kept = run.folder(runs) / "divergence.json"
    if not kept.is_file():
        final = load_policy(run.folder(runs) / stage / "final", Model(), trainable=False)
        before = load_policy(start(runs, run.seed) / "sft" / "final", Model(), trainable=False)
        codec = make_codec(final.tokenizer)
        prompts = [encode(row, Format.prompt, codec, "held out") for row in held_out()]
        groups = collect(frozen_engine(final), prompts, 1, Sampling(max_new_tokens=5), seed=run.seed)
        spent = float((logprobs(final, groups) - logprobs(before, groups)).sum()) / len(completions(groups))
        kept.write_text(json.dumps(spent))
    return float(json.loads(kept.read_text()))


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Mean over seeds, and the seeds' range."""
    if math.isnan(values[0]):
        return "–"
    low, high = min(values) * scale, max(values) * scale
    return f"{fmean(values) * scale:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def area(results: Sequence[Mapping[str, float]]) -> float:
    """The mean reward while training, over seeds; 0 of those that have none."""
    return fmean(0.0 if math.isnan(r["area"]) else r["area"] for r in results)


def table(file: Path, found: dict[str, list[dict[str, float]]], seeds: int) -> None:
    columns = ["method", "greedy %", "sampled %", "mean reward while training %", "KL, nats", "samples", "CPU seconds"]
    rows = []
    for title, results in sorted(found.items(), key=lambda item: -area(item[1])):
        by = {key: [r[key] for r in results] for key in results[0]}
        rows.append(
            [
                title,
                spread(by["greedy"], 100),
                spread(by["sampled"], 100),
                spread(by["area"], 100),
                spread(by["kl"], digits=2),
                f"{fmean(by['samples']):.0f}",
                f"{fmean(by['seconds']):.0f}",
            ]
        )
    write(file, columns, rows, seeds)


def write(file: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], seeds: int) -> None:
    """A table on the screen, and in `file` as Markdown."""
    console.table(f"mean over {seeds} seeds [their range]", columns, rows)
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    file.write_text("\n".join(lines) + "\n", "utf-8")


def draw_curves(axes: Axes, runs: Path, groups: dict[str, list[Run]], highlight: Sequence[str]) -> None:
    """The mean over seeds of reward against samples, seeds cut to the shortest; the rest in grey."""
    for title, members in groups.items():
        curves = [curve(runs, run) for run in members]
        steps = min(len(rewards) for _, rewards in curves)
        x = [fmean(samples[i] for samples, _ in curves) for i in range(steps)]
        y = [fmean(rewards[i] for _, rewards in curves) for i in range(steps)]
        seen = title in highlight
        color = f"C{highlight.index(title)}" if seen else "0.8"
        axes.plot(x, smooth(y), lw=1.8 if seen else 0.8, color=color, label=title if seen else None, zorder=1 + seen)
    axes.set(xlabel="samples", ylabel="share of right samples")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(y: Sequence[float], width: int = 3) -> list[float]:
    return [fmean(y[max(0, i - width + 1) : i + 1]) for i in range(len(y))]


def picture(file: Path, runs: Path, groups: dict[str, list[Run]], found: dict[str, list[dict[str, float]]]) -> None:
    """Curves and ends of methods; in colour the best, the last two, and those that most people know."""
    sampling = {t: members for t, members in groups.items() if area(found[t])}
    ranked = sorted(sampling, key=lambda t: -area(found[t]))
    named = [t for t in ("rloo", "grpo", "dapo", "ppo", "trpo", "online_dpo") if t in sampling]
    named = list(dict.fromkeys([*ranked[:1], *named, *ranked[-2:]]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    draw_curves(left, runs, sampling, named)
    draw_ends(right, {t: found[t] for t in [*(t for t in groups if t not in named), *named]}, named)
    figure.savefig(file, dpi=120)


def pictures(runs: Path, groups: dict[str, list[Run]], found: dict[str, list[dict[str, float]]]) -> None:
    picture(runs / "methods.png", runs, {t: members for t, members in groups.items() if t in METHODS}, found)
    for file, prefix in (("gae.png", "ppo"), ("frontier.png", "rloo")):
        some = {t: members for t, members in groups.items() if t.startswith(prefix)}
        if len(some) > 1:
            figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
            draw_curves(left, runs, some, list(some))
            draw_ends(right, {t: found[t] for t in some}, list(some))
            figure.savefig(runs / file, dpi=120)


def draw_ends(axes: Axes, found: dict[str, list[dict[str, float]]], named: Sequence[str]) -> None:
    """Where every seed ended, and in full colour the seeds' mean: accuracy against the KL that it cost."""
    colors = {t: f"C{i}" for i, t in enumerate(named)}
    for title, results in found.items():
        kl, accuracy = [r["kl"] for r in results], [r["sampled"] for r in results]
        color = colors.get(title, "0.7")
        axes.plot(kl, accuracy, ".", ms=4, alpha=0.4, color=color)
        axes.plot(fmean(kl), fmean(accuracy), "o", ms=7 if title in colors else 4, color=color)
    axes.set(xlabel="KL spent, nats a completion", ylabel="accuracy of samples, held out")
    axes.spines[["top", "right"]].set_visible(False)


def planned(methods: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Run]]:
    """The runs of each row of the table; of a whole table, those that explain others too."""
    groups = {m: [Run(m, m, seed) for seed in seeds] for m in methods}
    if methods == (*ANCESTORS, *NEWER):
        for updates in UPDATES:
            title = f"grpo num_minibatches={updates}"
            groups[title] = [Run(title, "grpo", seed, (f"stages.rl.num_minibatches={updates}",)) for seed in seeds]
    if methods == METHODS:
        for lam in LAMBDAS:
            title = f"ppo gae_lambda={lam:g}"
            if lam != PPO_LAMBDA:
                groups[title] = [Run(title, "ppo", seed, (f"stages.rl.gae_lambda={lam}",)) for seed in seeds]
        for beta in BETAS:
            title = f"rloo beta={beta:g}"
            groups[title] = [Run(title, "rloo", seed, (f"stages.rl.kl.beta={beta}",)) for seed in seeds]
    return groups


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=[])
    parser.add_argument("--newer", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--samples", type=int, default=30720)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    runs: Path = given.runs.resolve()
    methods = given.methods or ((*ANCESTORS, *NEWER) if given.newer else METHODS)
    groups = planned(methods, given.seeds)
    every = dict.fromkeys(run for members in zip(*groups.values(), strict=True) for run in members)
    later = [run for run in every if needed(run.method)]
    first = [run for run in every if run not in later]
    if later:
        first = list(dict.fromkeys([*(Run("rloo", "rloo", seed) for seed in given.seeds), *first]))
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        pool.starmap(train_start, [(runs, seed) for seed in given.seeds], chunksize=1)
        for part in (first, later):
            pool.map(train, [(run, runs, given.samples) for run in part], chunksize=1)
    found = {title: [result(runs, run, given.samples) for run in members] for title, members in groups.items()}
    name = "newer" if given.newer else "table"
    table(runs / f"{name}.md", found, len(given.seeds))
    if given.newer:
        picture(runs / "newer.png", runs, groups, found)
    else:
        pictures(runs, groups, found)
    print(runs / f"{name}.md")


if __name__ == "__main__":
    main()
