"""Greedy and sampled answers to held-out prompts, scored, with intervals.

Axes: P prompts, G samples a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlpost import console
from rlpost.engine.api import Engine
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import greedy
from rlpost.environments.loop import Collect, collector
from rlpost.environments.scoring import scored
from rlpost.evaluate.params import Evaluation
from rlpost.evaluate.statistics import Estimate, clustered_mean, clustered_share, pass_at_k
from rlpost.policy.judge import AnyJudge
from rlpost.policy.policy import Policy
from rlpost.rewards.score import Nested, RewardBatch, Scorer, mean
from rlpost.types import Group
from rlpost.usercode.bound import Bound
from rlpost.usercode.toolset import Tool

ALL = "all"


@dataclass(frozen=True)
class Summary:
    """The numbers of one mode, greedy or sampled."""

    prompts: int
    samples: int
    """Answers a prompt."""
    accuracy: dict[str, Estimate]
    """`all`, and each slice by its name: the share (or mean) of the first reward."""
    rewards: dict[str, float]
    """Mean of each reward over the answers it scored."""
    finish: dict[str, int]
    """Answers by how they ended: stop, length."""
    unscored: int
    """Answers that the first reward left unscored; they count as wrong."""
    length: float
    """Mean tokens an answer."""
    pass_at: dict[str, Estimate] = field(default_factory=dict)
    """k -> unbiased pass@k."""
    best_of: Estimate | None = None
    """The first reward of each prompt's best sample by total reward."""
    judged: Estimate | None = None
    """The first reward of each prompt's best sample by the judge's score."""


@dataclass(frozen=True)
class Answers:
    """Groups of answers and their scores."""

    mode: str
    """greedy or sampled."""
    groups: tuple[Group, ...]
    scores: RewardBatch
    judged: Nested | None = None
    """[P][G] the judge's scores, if there is one."""

    def rows(self, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """One row an answer, for samples.jsonl."""
        for p, (group, prompt) in enumerate(zip(self.groups, prompts, strict=True)):
            for g, completion in enumerate(group.completions):
                extra: dict[str, Any] = {} if self.judged is None else {"judged": self.judged[p][g]}
                if completion.messages:
                    extra["messages"] = [dict(message) for message in completion.messages]
                yield {
                    "mode": self.mode,
                    "prompt": prompt,
                    "completion": completion.text,
                    "finish": completion.finish,
                    "tokens": len(completion.ids),
                    "reward": self.scores.total[p][g],
                    "rewards": {name: values[p][g] for name, values in self.scores.by_name.items()},
                    **extra,
                    "example": dict(group.example),
                }


@dataclass(frozen=True)
class Result:
    """An evaluation of one policy."""

    summaries: dict[str, Summary]
    """By mode: greedy, sampled."""
    answers: tuple[Answers, ...]

    def to_json(self) -> dict[str, Any]:
        """The numbers, without the answers."""
        return {mode: asdict(summary) for mode, summary in self.summaries.items()}


def evaluate(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[Group],
    scorer: Scorer,
    cfg: Evaluation,
    seed: int,
    judge: AnyJudge | None = None,
    environment: Bound | Sequence[Tool] | None = None,
) -> Result:
    """Answer all prompts greedily and by sampling, as the recipe says, and score the answers.

    Args:
        engine: samples.
        policy: answers.
        prompts: groups without completions.
        scorer: the evaluation's rewards; the first is the accuracy.
        cfg: the recipe's `evaluation`.
        seed: of the samples.
        judge: chooses among a prompt's samples.
        environment: replies to the model's turns; or tools that the model calls.
    """
    engine.update_weights(policy, 0)
    collect = collector(engine, policy, environment, cfg.max_turns)
    modes = [("greedy", 1)] if cfg.greedy else []
    modes += [("sampled", cfg.samples)] if cfg.samples else []
    answers = []
    for mode, n in modes:
        sampling = greedy(cfg.sampling) if mode == "greedy" else cfg.sampling
        groups = _answer(collect, prompts, n, mode, sampling, cfg.batch, seed)
        judged = judge.by_group(groups) if judge is not None and n > 1 else None
        answers.append(Answers(mode, groups, scored(scorer, groups, policy), judged))
    return Result({a.mode: summarise(a, scorer.rewards[0].name, cfg) for a in answers}, tuple(answers))


def numbers(result: Result) -> dict[str, float]:
    """An evaluation as numbers by name, `greedy/accuracy`, for a log; `Evaluation.metrics` names them all."""
    found: dict[str, float] = {}
    for answers in result.answers:
        summary = result.summaries[answers.mode]
        count = summary.prompts * summary.samples
        own = {"accuracy" if part == ALL else f"accuracy/{part}": e.value for part, e in summary.accuracy.items()}
        total = mean(answers.scores.total)
        own |= {} if total is None else {"reward": total}
        own |= {f"reward/{name}": value for name, value in summary.rewards.items()}
        own |= {"unscored": summary.unscored / count, "truncated": summary.finish.get("length", 0) / count}
        own |= {"length": summary.length, **{f"pass@{k}": e.value for k, e in summary.pass_at.items()}}
        best = {"best_of": summary.best_of, "judged": summary.judged}
        own |= {name: estimate.value for name, estimate in best.items() if estimate is not None}
        found |= {f"{answers.mode}/{name}": value for name, value in own.items()}
    return found


def _answer(
    collect: Collect, prompts: Sequence[Group], n: int, mode: str, sampling: Sampling, batch: int, seed: int
) -> tuple[Group, ...]:
    at_once = max(1, batch // n)
    groups: list[Group] = []
    with console.Progress(f"{mode} answers", len(prompts)) as progress:
        for first in range(0, len(prompts), at_once):
            some = prompts[first : first + at_once]
            groups += collect(some, n, sampling, seed=seed, first=first)
            progress.advance(n=len(some))
    return tuple(groups)


def summarise(answers: Answers, accuracy: str, cfg: Evaluation) -> Summary:
    """Numbers with intervals from scored answers.

    Args:
        answers: of one mode.
        accuracy: name of the reward that says right or wrong.
        cfg: slices, pass@k and best-of-n of the recipe.
    """
    # Unscored answers count as wrong.
    correct_PG = [[0.0 if v is None else v for v in row] for row in answers.scores.by_name[accuracy]]
    completions = [c for g in answers.groups for c in g.completions]
    binary = {v for row in correct_PG for v in row} <= {0.0, 1.0}
    samples = max(len(g.completions) for g in answers.groups)
    by_total = _best_of(correct_PG, answers.scores.total) if cfg.best_of and samples > 1 else None
    return Summary(
        prompts=len(answers.groups),
        samples=samples,
        accuracy={name: _estimate([correct_PG[p] for p in rows]) for name, rows in _slices(answers, cfg).items()},
        rewards=answers.scores.means(),
        finish=dict(Counter(c.finish for c in completions)),
        unscored=sum(v is None for row in answers.scores.by_name[accuracy] for v in row),
        length=sum(len(c.ids) for c in completions) / len(completions),
        pass_at={str(k): _pass_at(correct_PG, k) for k in cfg.pass_at if binary and k <= samples},
        best_of=by_total,
        judged=None if answers.judged is None else _best_of(correct_PG, answers.judged),
    )


def _slices(answers: Answers, cfg: Evaluation) -> dict[str, list[int]]:
    """Prompts by slice: all of them, and for each column those where it is true."""
    chosen = {ALL: list(range(len(answers.groups)))}
    for column in cfg.slices:
        rows = [p for p, group in enumerate(answers.groups) if group.example.get(column)]
        if rows:
            chosen[column] = rows
    return chosen


def _estimate(scores: Sequence[Sequence[float]]) -> Estimate:
    """The share of right answers if all scores are in [0, 1], else the mean score."""
    known = all(0.0 <= v <= 1.0 for row in scores for v in row)
    return clustered_share(scores) if known else clustered_mean(scores)


def _pass_at(correct_PG: Sequence[Sequence[float]], k: int) -> Estimate:
    return clustered_share([[pass_at_k(len(row), int(sum(row)), k)] for row in correct_PG])


def _best_of(correct_PG: Sequence[Sequence[float]], by_PG: Nested) -> Estimate:
    return _estimate([[_best(correct, by)] for correct, by in zip(correct_PG, by_PG, strict=True)])


def _best(correct: Sequence[float], totals: Sequence[float | None]) -> float:
    """The first reward of the sample with the highest total; 0 where none was scored."""
    ranked = [(-math.inf if t is None else t, -i) for i, t in enumerate(totals)]
    top, index = max(ranked)
    return 0.0 if top == -math.inf else correct[-index]


def estimate_from(saved: Mapping[str, float]) -> Estimate:
    """An estimate as read back from JSON."""
    return Estimate(saved["value"], saved["low"], saved["high"])


def percent(estimate: Estimate) -> str:
    """ "93.4 [92.2, 94.4]" in percent."""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
