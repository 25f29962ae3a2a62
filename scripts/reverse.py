"""Does training in reverse help search? Forward, reverse, and both meeting in the middle: docs/reverse.md.

    python scripts/reverse.py [--seeds 0 1 2] [--out runs/reverse] [--sides 4 6 8 10] [--gaps 2 4 6]

For every world (scripts/reverse_worlds.py) and seed two tiny Llamas learn the same texts through `sft` stages, one of
them with `direction: reverse`, and are sampled from both ends of problems until one is solved or the budget of tokens
is spent; the world says what is legal. What is finished is not repeated. Writes table.md and reverse.png into the
folder of runs. One core, minutes. Needs matplotlib (`pip install rlpost[plots]`).
"""

from __future__ import annotations

import argparse
import json
import random as randomness
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from reverse_worlds import SHAPES, Arithmetic, Maze, Node, Problem, Visits, World, make_maze

from rlpost import console, pipeline
from rlpost.data.codec import make_codec
from rlpost.engine.collect import collect
from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.evaluate.statistics import Estimate, clustered_mean, wilson
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.recipe.resolve import resolve
from rlpost.types import Group

WAYS = ("forward", "reverse", "both")
COLORS = {"forward": "C0", "reverse": "C1", "both": "C2"}
PROBLEMS = 64
"""Drawn a world and seed, with replacement."""
TEXTS = 4096
BUDGET = {"maze": 500, "arithmetic": 2000}
"""Tokens a problem."""
STEPS = {"maze": 20, "arithmetic": 500}
"""Of training, a direction; in a maze for each cell of its side."""
RATE = {"maze": 1e-2, "arithmetic": 5e-3}
"""Learning rate."""
NETWORK = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Case:
    """One world of one size and seed."""

    title: str
    size: int
    seed: int
    world: World
    problems: tuple[Problem, ...]
    kind: str
    """`maze` or `arithmetic`."""
    run: str
    """Whose models are sampled."""

    @property
    def budget(self) -> int:
        """Tokens a problem."""
        return BUDGET[self.kind]


@dataclass(frozen=True)
class Sample:
    """What a model wrote from one end of a problem, its end being the first that is visited."""

    visits: Visits
    tokens: int

    def half(self, tokens: int) -> Sample:
        """Its beginning: a sample of the model with that limit."""
        return Sample(tuple(v for v in self.visits if v[1] <= tokens), min(self.tokens, tokens))


@dataclass(frozen=True)
class Found:
    """How a search ended."""

    tokens: int
    """Sampled until it was solved; all of them if it was not."""
    path: tuple[Node, ...] | None
    """From start to goal."""


@dataclass(frozen=True)
class Result:
    """What came of a case: a number a problem."""

    tokens: Mapping[str, list[int]]
    solved: Mapping[str, list[bool]]
    rate: Mapping[str, list[float]]
    """Forward and reverse: the share of the model's full samples that solve the problem."""
    chance: Mapping[str, list[float]]
    """The same of the teacher, exactly."""
    perfect: Mapping[str, list[tuple[float, float]]]
    """Forward and reverse: success and tokens expected of the teacher."""
    legal: Mapping[str, float]
    """The share of full samples that are legal to their end."""


def search(problem: Problem, forward: Sequence[Sample], reverse: Sequence[Sample], budget: int) -> Found:
    """Samples from both ends in turn until one comes to a place that the other end has reached.

    Every place that was reached is kept with the way there. With samples from one end alone that is a search from
    it: the other end has reached itself. A sample is paid for whole, but for the one that succeeds.
    """
    reached: tuple[dict[Node, tuple[Node, ...]], ...] = (
        {problem.start: (problem.start,)},
        {problem.goal: (problem.goal,)},
    )
    spent = 0
    turns = [(side, s) for pair in zip_longest(forward, reverse) for side, s in enumerate(pair) if s is not None]
    for side, sample in turns:
        own, other = reached[side], reached[1 - side]
        way: tuple[Node, ...] = (problem.goal if side else problem.start,)
        for node, tokens in sample.visits:
            way = (*way, node)
            if spent + tokens > budget:
                return Found(budget, None)
            if node in other:
                ahead, behind = (other[node], way) if side else (way, other[node])
                return Found(spent + tokens, (*ahead, *behind[-2::-1]))
            own.setdefault(node, way)
        spent += sample.tokens
    return Found(min(spent, budget), None)


def cases(sides: Sequence[int], gaps: Sequence[int], seeds: Sequence[int]) -> list[Case]:
    """All worlds, with their problems."""
    worlds: list[tuple[str, int, int, Maze | Arithmetic, str]] = [
        (shape, side, seed, make_maze(shape, side, seed), f"{shape}-{side}-seed{seed}")
        for shape in SHAPES
        for side in sides
        for seed in seeds
    ]
    worlds += [("arithmetic", k, seed, Arithmetic(k), f"arithmetic-seed{seed}") for k in gaps for seed in seeds]
    found = []
    for title, size, seed, world, run in worlds:
        problems = tuple(randomness.Random(f"{run}/{size}").choices(world.problems, k=PROBLEMS))
        found.append(Case(title, size, seed, world, problems, "maze" if title in SHAPES else title, run))
    return found


def train(case: Case, out: Path) -> None:
    """Both models of a case: one recipe, in which the second stage reads the first one's rows from their end."""
    folder = out / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"{case.run}.jsonl"
    rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in case.world.texts(TEXTS, case.seed)), "utf-8")
    stage = {
        "kind": "sft",
        "steps": STEPS[case.kind] * (case.size if case.kind == "maze" else 1),
        "batch_size": 64,
        "learning_rate": RATE[case.kind],
        "betas": [0.9, 0.99],
        "schedule": "cosine",
        "warmup": 0.05,
        "max_length": 64,
        "max_tokens_per_microbatch": 4096,
    }
    recipe = {
        "run": case.run,
        "runs": str(out),
        "seed": case.seed,
        "threads": 1,
        "model": {
            "config": NETWORK,
            "tokenizer": {"kind": "characters", "alphabet": case.world.alphabet},
            "precision": "float32",
        },
        "stages": {
            "forward": {**stage, "data": {"texts": {"path": str(rows)}}},
            "reverse": {**stage, "start": "base", "data": {"texts": {"path": str(rows), "direction": "reverse"}}},
        },
    }
    file = folder / f"{case.run}.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False), "utf-8")
    pipeline.train(resolve(str(file)))


def sampled(case: Case, out: Path, way: str) -> list[list[Sample]]:
    """As many full samples of each problem as the budget pays for, from its start or from its goal."""
    backward = way == "reverse"
    policy = load_policy(out / case.run / way / "final", Model(), trainable=False, backwards=backward)
    codec = make_codec(policy.tokenizer)
    begin = policy.tokenizer.bos_token_id
    groups = [Group((begin, *codec.ids(case.world.opening(p, backward), "a problem")), ()) for p in case.problems]
    size = case.problems[0].tokens
    seed = 2 * case.seed + backward
    filled = collect(frozen_engine(policy), groups, case.budget // size, Sampling(max_new_tokens=size), seed)
    # With its special tokens, so that what stands after one is not taken for what stands after a cell.
    decode = policy.tokenizer.decode
    return [
        [Sample(case.world.visits(problem, decode(c.ids.tolist()), backward), len(c.ids)) for c in group.completions]
        for problem, group in zip(case.problems, filled, strict=True)
    ]


def measured(case: Case, out: Path) -> Result:
    """All searches of a case, each path checked by the world."""
    samples = {way: sampled(case, out, way) for way in ("forward", "reverse")}
    tokens: dict[str, list[int]] = {way: [] for way in WAYS}
    solved: dict[str, list[bool]] = {way: [] for way in WAYS}
    rate: dict[str, list[float]] = {way: [] for way in samples}
    for problem, forward, reverse in zip(case.problems, samples["forward"], samples["reverse"], strict=True):
        half = problem.tokens // 2
        halves = [[s.half(half) for s in side] for side in (forward, reverse)]
        for way, sides in (("forward", (forward, [])), ("reverse", ([], reverse)), ("both", halves)):
            found = search(problem, sides[0], sides[1], case.budget)
            assert found.path is None or case.world.legal(problem, found.path), f"{case.run}: {found.path}"
            tokens[way].append(found.tokens if found.path else case.budget)
            solved[way].append(found.path is not None)
        for way, side, end in (("forward", forward, problem.goal), ("reverse", reverse, problem.start)):
            rate[way].append(fmean(any(node == end for node, _ in s.visits) for s in side))
    arrivals = {way: [case.world.arrivals(p, way == "reverse") for p in case.problems] for way in samples}
    chance = {way: [sum(a) for a in arrivals[way]] for way in samples}
    expected = {way: [perfect(a, case.budget) for a in arrivals[way]] for way in samples}
    legal = {way: fmean(reaches_end(s) for side in samples[way] for s in side) for way in samples}
    return Result(tokens, solved, rate, chance, expected, legal)


def reaches_end(sample: Sample) -> bool:
    """Whether all that was written is legal."""
    return bool(sample.visits) and sample.visits[-1][1] == sample.tokens


def result(case: Case, out: Path) -> Result:
    """Trained and measured, or as it was found before."""
    kept = out / case.run / f"searches-{case.size}.json"
    if not kept.is_file():
        train(case, out)
        kept.write_text(json.dumps(asdict(measured(case, out))))
    return Result(**json.loads(kept.read_text()))


def perfect(arrivals: Sequence[float], budget: int) -> tuple[float, float]:
    """What is expected of the search with the perfect teacher's samples: the success within the budget, the tokens.

    With p the chance of one sample, the n-th is the first to succeed with (1 − p)ⁿ⁻¹·p, and before it are n − 1 whole
    ones.
    """
    size, missed, tokens = len(arrivals), 1.0, 0.0
    for begun in range(0, budget - size + 1, size):
        tokens += missed * sum(p * (begun + t) for t, p in enumerate(arrivals, 1))
        missed *= 1 - sum(arrivals)
    return 1 - missed, tokens + missed * budget


def success(results: Sequence[Result], way: str) -> Estimate:
    """Share of the problems solved within the budget, all seeds together."""
    solved = [s for r in results for s in r.solved[way]]
    return wilson(sum(solved), len(solved))


def spent(results: Sequence[Result], way: str) -> Estimate:
    """Mean tokens a problem, those of an unsolved one being the budget."""
    return clustered_mean([[float(t)] for r in results for t in r.tokens[way]])


Results = Mapping[tuple[str, int], Sequence[Result]]
"""(world, size) -> a result a seed."""


def table(out: Path, found: Results) -> None:
    columns = ["world", "size", *(f"{way}, solved %" for way in WAYS), *(f"{way}, tokens" for way in WAYS)]
    columns += ["teacher, % a sample", "model, % a sample", "legal samples %"]
    rows = []
    for (title, size), results in found.items():
        row = [title, str(size)]
        row += [interval(success(results, way), 100) for way in WAYS]
        row += [interval(spent(results, way), 1) for way in WAYS]
        for name in ("chance", "rate"):
            means = [100 * fmean(x for r in results for x in getattr(r, name)[way]) for way in WAYS[:2]]
            row.append(" / ".join(f"{m:.1f}" for m in means))
        row.append(" / ".join(f"{100 * fmean(r.legal[way] for r in results):.0f}" for way in WAYS[:2]))
        rows.append(row)
    console.table("all seeds [95 % interval]; two numbers: forward / reverse", columns, rows)
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    (out / "table.md").write_text("\n".join(lines) + "\n")


def interval(estimate: Estimate, scale: float) -> str:
    return f"{estimate.value * scale:.0f} [{estimate.low * scale:.0f}, {estimate.high * scale:.0f}]"


def draw(out: Path, found: Results) -> None:
    """Success within the budget and tokens spent against size, a column a world; the teacher's, exactly, dashed."""
    titles = list(dict.fromkeys(title for title, _ in found))
    figure, axes = plt.subplots(2, len(titles), figsize=(13, 6), sharex="col", sharey="row", layout="constrained")
    for column, title in enumerate(titles):
        some = {size: results for (t, size), results in found.items() if t == title}
        kind = "maze" if title in SHAPES else title
        for way in WAYS:
            _line(axes[0, column], some, way, [success(r, way) for r in some.values()], _seed_success)
            _line(axes[1, column], some, way, [spent(r, way) for r in some.values()], _seed_tokens)
        for way in WAYS[:2]:
            for number, axis in enumerate(axes[:, column]):
                exact = [fmean(e[number] for r in results for e in r.perfect[way]) for results in some.values()]
                axis.plot(list(some), exact, "--", lw=1, color=COLORS[way], alpha=0.7)
        axes[1, column].axhline(BUDGET[kind], color="0.75", lw=0.8, zorder=0)
        axes[1, column].text(next(iter(some)), BUDGET[kind] * 1.08, "budget", color="0.5", fontsize=8)
        axes[0, column].set_title(title if kind != "maze" else f"maze, {title}", fontsize=11)
        axes[1, column].set(xlabel="cells a side" if kind == "maze" else "operations to fill in", xticks=list(some))
        axes[1, column].set_yscale("log")
    axes[0, 0].set(ylabel="solved within the budget", ylim=(-0.03, 1.05))
    axes[1, 0].set(ylabel="tokens a problem, mean")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=COLORS[way], marker="o", label=way) for way in WAYS]
    handles.append(Line2D([], [], color="0.4", ls="--", lw=1, label="perfect teacher, exact"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out / "reverse.png", dpi=110)
    plt.close(figure)


def _line(
    axes: Axes,
    some: Mapping[int, Sequence[Result]],
    way: str,
    estimates: Sequence[Estimate],
    of_seed: Callable[[Result, str], float],
) -> None:
    sizes, color = list(some), COLORS[way]
    axes.plot(sizes, [e.value for e in estimates], "o-", color=color, ms=5, lw=1.8)
    axes.fill_between(sizes, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.15, lw=0)
    for size, results in some.items():
        axes.plot([size] * len(results), [of_seed(r, way) for r in results], ".", color=color, ms=4, alpha=0.45)


def _seed_success(result: Result, way: str) -> float:
    return fmean(result.solved[way])


def _seed_tokens(result: Result, way: str) -> float:
    return fmean(result.tokens[way])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=[4, 6, 8, 10])
    parser.add_argument("--gaps", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--out", type=Path, default=Path("runs/reverse"))
    given = parser.parse_args()
    out: Path = given.out.resolve()
    found: dict[tuple[str, int], list[Result]] = {}
    for case in cases(given.sides, given.gaps, given.seeds):
        found.setdefault((case.title, case.size), []).append(result(case, out))
    table(out, found)
    draw(out, found)
    print(out / "table.md")


if __name__ == "__main__":
    main()
