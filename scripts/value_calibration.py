"""Value networks against the truth: every way to train one, on goals it was trained on and on goals it never saw.

    python scripts/value_calibration.py [--seeds 0 1] [--runs runs]

A tiny Llama learns addition from a teacher who forgets the carry. A value network reads a goal, the last two of an
answer's three digits, beside the problem. All likely answers of held-out problems are enumerated, so the true V of
every state is known. Prints a Markdown table, means over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpost import pipeline
from rlpost.data.codec import Codec, make_codec
from rlpost.data.encoders import plain_prompt
from rlpost.data.tasks import addition
from rlpost.goals.calibration import Calibration, calibrate
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.unfold import Unfolded, unfold
from rlpost.goals.value_network import load_value
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.recipe.resolve import resolve

ENDINGS = [f"{tens}{hundreds}" for hundreds in "01" for tens in "0123456789"]
HELD_OUT = ENDINGS[3::7]
"""Never a goal in training, unless hindsight finds it."""
PROBLEMS = 5
LEAST = 1e-4
"""Probability from which on a state is followed."""
LIKELY = 0.02
"""Goals that a problem's answers reach less often are left out: almost any value is right about them."""
VALUE: dict[str, Any] = {
    "kind": "value",
    "data": {"problems": {"task": {"fn": "addition.train"}}},
    "goals": {"texts": [e for e in ENDINGS if e not in HELD_OUT]},
    "condition": "{goal}?",
    "hindsight_tokens": 2,
    "sampling": {"max_new_tokens": 5},
    "prompts_per_step": 48,
    "group_size": 8,
    "num_minibatches": 4,
    "steps": 300,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "max_length": 24,
    "checkpoint_every": 1000,
}
WAYS: dict[str, dict[str, Any]] = {
    "Monte Carlo": {},
    "Monte Carlo, hindsight ½": {"hindsight": 0.5},
    "bootstrap": {"target": "bootstrap"},
    "contrastive": {"target": "contrastive"},
}


def recipe(runs: Path, seed: int) -> dict[str, Any]:
    """SFT, then a value stage for every way."""
    teacher = {"fn": "addition.careless_teacher", "args": {"forgets": 0.6}}
    sft = {
        "kind": "sft",
        "data": {"problems": {"task": {"fn": "addition.train"}, "augment": teacher}},
        "steps": 250,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "max_length": 24,
    }
    values = {name_of(way): {**VALUE, **settings} for way, settings in WAYS.items()}
    return {
        "run": f"calibration_{seed}",
        "runs": str(runs),
        "seed": seed,
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32,
                "initializer_range": 0.125,
            },
            "tokenizer": {"kind": "characters", "alphabet": "0123456789+=?"},
            "precision": "float32",
        },
        "stages": {"sft": sft, **values},
    }


def name_of(way: str) -> str:
    """A way as a stage's name."""
    return way.lower().replace(", ", "_").replace(" ½", "").replace(" ", "_")


def questions(policy: Policy, codec: Codec) -> list[tuple[Unfolded, str, tuple[int, ...]]]:
    """Held-out problems with all their likely answers, and the endings that matter to each."""
    found = []
    for row in addition.held_out(n=PROBLEMS):
        prompt = plain_prompt(row["prompt"], codec, "the prompt")
        answers = unfold(policy, prompt, VALUE["sampling"]["max_new_tokens"], least=LEAST)
        for ending in ENDINGS:
            ids = codec.ids(ending, "the goal")
            if float(answers.values(GoalSet([ids]))[0]) >= LIKELY:
                found.append((answers, ending, ids))
    return found


def measured(run: Path) -> dict[str, dict[bool, list[Calibration]]]:
    """Way -> goal held out? -> what the network knows of it, for every problem and goal."""
    policy = load_policy(run / "sft/final", Model(), trainable=False)
    asked = questions(policy, make_codec(policy.tokenizer))
    found: dict[str, dict[bool, list[Calibration]]] = {}
    for way in WAYS:
        network = load_value(run / name_of(way) / "final", policy, (), avoid=False)
        found[way] = {False: [], True: []}
        for answers, ending, ids in asked:
            compared = calibrate(network.about(ids), answers, GoalSet([ids]))
            found[way][ending in HELD_OUT].append(compared)
    return found


def line(way: str, kind: str, seeds: Sequence[Sequence[Calibration]]) -> str:
    """A row of the table: means over seeds of means over problems and goals."""

    def mean(name: str) -> float:
        return statistics.fmean(statistics.fmean(getattr(c, name) for c in found) for found in seeds)

    errors = [f"{mean(name):.3f}" for name in ("mean_error", "root_mean_square", "largest", "calibration_error")]
    return f"| {way} | {kind} | {' | '.join(errors)} | {statistics.fmean(map(worth, seeds)):.1f} |"


def worth(found: Sequence[Calibration]) -> float:
    """Samples a state that would be off as much, over all problems and goals."""
    square = [c.root_mean_square**2 for c in found]
    return sum(c.worth * s for c, s in zip(found, square, strict=True)) / sum(square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        file = args.runs / f"calibration_{seed}.yaml"
        # JSON is YAML without aliases, which recipes refuse.
        file.write_text(json.dumps(recipe(args.runs.resolve(), seed), indent=1, ensure_ascii=False), "utf-8")
        pipeline.train(resolve(str(file)))
        results.append(measured(args.runs / f"calibration_{seed}"))
    print(
        "| trained by | goals | mean error | root mean square | largest | ECE | worth |\n|---|---|---|---|---|---|---|"
    )
    for way in WAYS:
        for kind, held in (("trained on", False), ("held out", True)):
            print(line(way, kind, [found[way][held] for found in results]))


if __name__ == "__main__":
    main()
