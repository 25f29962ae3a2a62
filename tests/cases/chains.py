"""A chain of every sort of stage that trains, whole and interrupted in each of its stages: both end alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import DPO, GRPO, PAIRS, PPO, SFT, run, sha256

from rlpost.errors import UnexpectedError
from rlpost.train.learner import Learner

_EVERY = {"steps": 4, "checkpoint_every": 2}
REWARD_MODEL: dict[str, Any] = {**DPO, **_EVERY, "kind": "reward_model"}
STAGES: dict[str, Any] = {
    "sft": {**SFT, **_EVERY},
    "pairs": PAIRS,
    "dpo": {**DPO, **_EVERY, "data": {"own": {"stage": "pairs"}}, "reference": "base"},
    "reward": {**REWARD_MODEL, "data": {"own": {"stage": "pairs"}}, "start": "sft"},
    "grpo": {**GRPO, **_EVERY, "kl": {"beta": 0.05}, "reference": "base", "start": "dpo"},
    # With a critic, and a policy and a reference that begin at the base.
    "ppo": {**PPO, **_EVERY, "kl": {"beta": 0.05}, "start": "base"},
}
INTERRUPTED = 5
"""In every stage but the first it is the fifth update of a process that stops: after a checkpoint, before the end."""


def left(folder: Path) -> dict[str, str]:
    """sha256 of all weights, metrics and samples of a run."""
    files = [*folder.glob("*/final/*.safetensors"), *folder.glob("*/metrics.jsonl"), *folder.glob("*/rollouts/*")]
    return {str(f.relative_to(folder)): sha256(f) for f in files}


def same_after_interruptions(folder: Path, *overrides: str) -> None:
    """Run the chain at once, and again with a stop in one stage after another, and compare what is left."""
    run(folder, STAGES, *overrides, "run=whole")
    update, stops, done = Learner.update, 0, False
    while not done:
        calls: list[int] = []

        def until_stopped(self: Learner, *args: Any, **more: Any) -> Any:
            calls.append(1)  # noqa: B023 - called in this round alone
            if len(calls) == INTERRUPTED:  # noqa: B023
                raise RuntimeError("stopped")
            return update(self, *args, **more)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Learner, "update", until_stopped)
            try:
                run(folder, STAGES, *overrides)
                done = True
            except UnexpectedError:
                stops += 1
    assert stops == 5
    whole = left(folder / "runs/whole")
    assert len(whole) == 19
    assert left(folder / "runs/run") == whole
