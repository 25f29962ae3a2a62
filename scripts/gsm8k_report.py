"""What the GSM8K run learned, in numbers with intervals.

    python scripts/gsm8k_report.py DATA_FOLDER [--runs runs] [--run gsm8k_tiny] [--folds 5]

DATA_FOLDER holds train.jsonl, test.jsonl and example_model_solutions.jsonl; the run is `rlpost train gsm8k_tiny`'s.
Reports held-out negative log-likelihood per stage; preference accuracy on pairs of held-out questions, pooled over
folds of questions (one DPO from the run's SFT checkpoint a fold), its interval clustered by question; correctness
and format of sampled answers per stage, intervals clustered by question.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from rlpost import console, pipeline
from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import KFold, KFoldPart, Source, TooLong
from rlpost.evaluate.evaluator import percent
from rlpost.evaluate.statistics import clustered_mean, clustered_share
from rlpost.objectives.preference import pairs_of
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.recipe.resolve import resolve
from rlpost.train.experience import Experience
from rlpost.types import Group
from rlpost.usercode.binding import bind
from rlpost.usercode.params import TimedFunction

MODEL = Model()


def source(path: Path, map_: str, fold: int, folds: int, part: KFoldPart) -> Source:
    return Source(
        path=str(path),
        map=TimedFunction(fn=f"gsm8k.{map_}"),
        kfold=KFold(by="question", of=folds, hold_out=fold, part=part),
    )


def groups_of(policy: Policy, rows: Source, need: DataRole) -> list[Group]:
    data = open_dataset(
        {"rows": rows},
        make_codec(policy.tokenizer),
        need=need,
        limit=Limit(policy.max_positions, TooLong.drop),
        seed=0,
        where="report",
        stages=Path,
        bind=bind,
    )
    return data.all()


def nll_rows(run: Path, data: Path, folds: int) -> list[list[str]]:
    """Held-out NLL per token of the reference solutions, stage by stage."""
    rows = []
    for stage, folder in (("base", "base"), *((s, f"{s}/final") for s in ("sft", "dpo", "grpo"))):
        policy = load_policy(run / folder, MODEL, trainable=False)
        held_out = groups_of(
            policy, source(data / "test.jsonl", "question_answer", 0, folds, KFoldPart.held_out), DataRole.completions
        )
        lengths = [sum(c.actions for c in g.completions) for g in held_out]
        by_question = [(-x).tolist() for x in torch.split(logprobs(policy, held_out).double(), lengths)]
        nll = clustered_mean(by_question)
        rows.append([stage, f"{nll.value:.3f} [{nll.low:.3f}, {nll.high:.3f}]", str(sum(lengths)), str(len(held_out))])
    return rows


def fold_margins(run: Path, data: Path, fold: int, folds: int) -> dict[str, dict[str, list[float]]]:
    """question -> 0/1 a held-out pair: by DPO's implicit reward, and by SFT's own likelihood per token."""
    start = run / "sft" / "final"
    name = f"{run.name}_fold{fold}"
    if not (run.parent / name).exists():
        # The run as it was after SFT; its own DPO is that of fold 0.
        dropped = ["grpo", "evaluation", "checkpoints", *(["dpo"] if fold else [])]
        shutil.copytree(run, run.parent / name, ignore=shutil.ignore_patterns(*dropped))
    words = [f"vars.data={data}", f"vars.kfold={fold}", f"runs={run.parent}", f"run={name}", "evaluation=null"]
    checkpoint = pipeline.train(resolve("gsm8k_tiny", [*words, "stages.grpo.enabled=false"]), allow_change=True)
    before, after = (load_policy(p, MODEL, trainable=False) for p in (start, checkpoint))
    solutions = data / "example_model_solutions.jsonl"
    pairs = groups_of(after, source(solutions, "solution_pairs", fold, folds, KFoldPart.held_out), DataRole.pairs)
    rows = Experience(tuple(pairs)).rows
    scored = pairs_of(logprobs(after, pairs), logprobs(before, pairs), rows)
    sft = pairs_of(logprobs(before, pairs), torch.zeros(rows.actions), rows).mean_logp_P2
    judged: dict[str, dict[str, list[float]]] = {"dpo": defaultdict(list), "sft": defaultdict(list)}
    for group, margin, mean in zip(pairs, scored.margin_P.tolist(), sft.tolist(), strict=True):
        question = group.example["question"]
        judged["dpo"][question].append(float(margin > 0))
        judged["sft"][question].append(float(mean[0] > mean[1]))
    return judged


def preference_rows(run: Path, data: Path, folds: int) -> list[list[str]]:
    pooled: dict[str, dict[str, list[float]]] = {"dpo": {}, "sft": {}}
    for fold in range(folds):
        for by, judged in fold_margins(run, data, fold, folds).items():
            pooled[by] |= judged
    names = {"dpo": "DPO's implicit reward", "sft": "SFT's likelihood per token"}
    rows = []
    for by, judged in pooled.items():
        share = clustered_share(list(judged.values()))
        verdict = "above chance" if share.low > 0.5 else "not above chance"
        rows.append([names[by], percent(share), str(sum(map(len, judged.values()))), str(len(judged)), verdict])
    return rows


def answer_rows(run: Path) -> list[list[str]]:
    """Correctness and format of sampled answers, from the run's evaluation files."""
    rows = []
    for stage in ("base", "sft", "dpo", "grpo"):
        values: dict[str, dict[str, list[float]]] = {"math_answer": defaultdict(list), "format": defaultdict(list)}
        with (run / "evaluation" / f"{stage}.jsonl").open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if row["mode"] == "sampled":
                    for name, by_prompt in values.items():
                        by_prompt[row["prompt"]].append(float(row["rewards"][name] or 0))
        shares: list[Any] = [clustered_share(list(by_prompt.values())) for by_prompt in values.values()]
        samples = sum(map(len, values["format"].values()))
        rows.append([stage, *(percent(s) for s in shares), str(samples)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--run", default="gsm8k_tiny")
    parser.add_argument("--folds", type=int, default=5)
    given = parser.parse_args()
    run = (given.runs / given.run).resolve()
    data = given.data.resolve()
    console.table(
        "held-out negative log-likelihood, nats a token [95 % interval]",
        ["stage", "NLL", "tokens", "questions"],
        nll_rows(run, data, given.folds),
    )
    console.table(
        "sampled answers to held-out questions, % [95 % interval]",
        ["stage", "correct", "format", "samples"],
        answer_rows(run),
    )
    console.table(
        f"held-out preference accuracy over {given.folds} folds of questions, % [95 % interval]",
        ["judged by", "accuracy", "pairs", "questions", ""],
        preference_rows(run, data, given.folds),
    )


if __name__ == "__main__":
    main()
