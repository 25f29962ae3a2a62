"""rlpost's side of the benchmark: a real recipe through the real command path, held at the gate by a tracker."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def gate_tracker() -> Any:
    """The tracker of the recipes below: told of every step, it stops at the gate."""
    from gate import Gate

    gate = Gate()

    class AtGate:
        def log(self, step: int, metrics: dict[str, float]) -> None:
            loss = next((v for k, v in metrics.items() if k.endswith(("/nll", "/loss"))), None)
            gate.passed(step=step, loss=loss, tokens=metrics.get("rl/tokens"))

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
        "checkpoint_every": 10_000,
    }
    if work["kind"] == "grpo":
        stage |= {
            "prompts_per_step": work["batch"],
            "group_size": work["group"],
            "sampling": {"max_new_tokens": work["most"]},
            "rewards": [{"fn": f"{HERE / 'rewards.py'}:words"}],
            "rollouts_every": 10_000,
        }
    else:
        stage["batch_size"] = work["batch"]
    if work["kind"] == "dpo":
        stage["loss"] = {"fn": "dpo", "args": {"beta": 0.1}}
    model: dict[str, Any] = {"path": work["model"], "precision": work["precision"]}
    if work.get("lora"):
        model["lora"] = {"r": 16, "alpha": 32}
    return {
        "threads": 2,
        "model": model,
        "stages": {"rl": stage},
        "logging": {"to": [f"{HERE / 'side_rlpost.py'}:gate_tracker"], "samples": 0},
    }


def main() -> None:
    import yaml

    import rlpost

    work = json.loads(sys.argv[1])
    folder = Path(work["folder"])
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(work)))
    rlpost.train(str(file), [f"runs={folder / 'runs'}", *work.get("overrides", [])])


if __name__ == "__main__":
    main()
