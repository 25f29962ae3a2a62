"""rlpost's side of the benchmark: a real recipe through the real command path, held at the gate by a tracker."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ONCE: dict[str, float] = {}
"""What is told beside every step: the seconds of what is done once, before them, and a number to be the same."""


def gate_tracker(run: Any) -> Any:  # noqa: ARG001
    """The tracker of the recipes below: told of every step, it stops at the gate."""
    from gate import Gate

    gate = Gate()
    # A recipe's functions are loaded from their file once more; ONCE is the one that main() fills.
    once: dict[str, float] = vars(sys.modules["__main__"]).get("ONCE", {})

    class AtGate:
        def log(self, step: int, metrics: dict[str, float]) -> None:  # noqa: ARG002
            told = {name.partition("/")[2]: value for name, value in metrics.items()}
            loss = told.get("nll", told["loss"])
            gate.passed(loss=loss, grad_norm=told["grad_norm"], length=told.get("length"), **once)

        def table(self, *_: Any) -> None:
            pass

        def close(self) -> None:
            pass

    return AtGate()


def recipe(work: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a workload."""
    stage: dict[str, Any] = {
        "kind": work["kind"],
        "data": {"rows": {"path": work["rows"]}},
        "steps": work["steps"],
        "learning_rate": work["learning_rate"],
        "schedule": "constant",
        "max_length": 2048,
        "checkpoint_every": 100_000,
    }
    if work["kind"] == "grpo":
        stage |= {
            "prompts_per_step": work["batch"],
            "group_size": work["group"],
            "sampling": {"max_new_tokens": work["most"]},
            "rewards": [{"fn": f"{HERE / 'rewards.py'}:words"}],
            "table_every": 0,
        }
    else:
        stage["batch_size"] = work["batch"]
    if work["kind"] == "dpo":
        stage["loss"] = {"fn": "dpo", "args": {"beta": 0.1}}
    model: dict[str, Any] = {"path": work["model"], "precision": work["precision"]}
    if work.get("lora"):
        model["lora"] = {"r": 16, "alpha": 32}
    return {
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "model": model,
        "stages": {"rl": stage},
        "logging": {"to": [f"{HERE / 'side_rlpost.py'}:gate_tracker"], "samples": 0},
    }


def time_reference_pass(steps: int) -> None:
    """Note the seconds of the reference's pass over the whole dataset, which DPO makes before its steps."""
    from rlpost.stages import dpo

    class Timed(dpo.ReferenceLogprobs):
        def __init__(self, *given: Any, **named: Any) -> None:
            began = time.perf_counter()
            super().__init__(*given, **named)
            ONCE.update(once=time.perf_counter() - began, of=steps)

    dpo.ReferenceLogprobs = Timed  # type: ignore[misc]


def given_logprob(work: dict[str, Any]) -> float:
    """The mean log-probability of given completions, as the update computes it."""
    import numpy as np
    import torch

    from rlpost.policy.load import load_policy
    from rlpost.policy.params import Model
    from rlpost.types import Completion, Group

    policy = load_policy(work["model"], Model(path=work["model"]), bfloat16=work["precision"] == "bfloat16")
    rows = [(row["prompt"], row["completion"]) for row in work["given"]]
    groups = [Group(prompt, [Completion(ids, np.ones(len(ids), bool))]) for prompt, ids in rows]
    with torch.no_grad():
        return float(policy(policy.batch(groups)).logp_N.double().mean())


def main() -> None:
    import yaml

    from rlpost.cli.importing import importing

    with importing():  # as the command does
        import rlpost
        from rlpost import pipeline  # noqa: F401

    work = json.loads(sys.argv[1])
    folder = Path(work["folder"])
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(work)))
    if work["kind"] == "dpo":
        time_reference_pass(work["steps"])
    if "given" in work:
        ONCE["given_logprob"] = given_logprob(work)
    rlpost.train(str(file), [f"runs={folder / 'runs'}"])


if __name__ == "__main__":
    main()
