"""Runs whose engine keeps rows from call to call, stopped between two calls of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_recipes import GRPO, run, sha256

from rlpost.engine.local import LocalEngine

TURNS = """\
def reply(text, turns):
    return "+4=" if len(turns) < 3 else None
"""
STAGE: dict[str, Any] = {**GRPO, "steps": 4, "checkpoint_every": 2, "keep_checkpoints": 1, "max_length": 32}
EPISODES = {
    **STAGE,
    "environment": {"fn": "turns.py:reply"},
    "max_turns": 3,
    "sampling": {"max_new_tokens": 20, "stop": ["1", "2", "3", "4", "5"]},
}
VINE = {**STAGE, "advantage": {"fn": "monte_carlo_values"}, "step_end": "", "fresh_rollouts": 2}


def left(run: Path) -> dict[str, str]:
    kinds = ("*/final/*.safetensors", "*/metrics.jsonl", "*/rollouts/*")
    return {str(f.relative_to(run)): sha256(f) for kind in kinds for f in run.glob(kind)}


@pytest.mark.parametrize(
    ("stage", "calls"),
    [pytest.param(EPISODES, 3, id="episodes"), pytest.param(VINE, 2, id="vine", marks=pytest.mark.slow)],
)
def test_a_run_that_was_stopped_inside_a_step_ends_as_the_whole_one(tmp_path, monkeypatch, stage, calls):
    (tmp_path / "turns.py").write_text(TURNS, "utf-8")
    generate, made, reused = LocalEngine.generate, [], []

    def counting(self, requests):
        made.append(self)
        if len(made) == stop_at:
            raise KeyboardInterrupt
        before = self.kept.reused
        found = generate(self, requests)
        reused.append(self.kept.reused - before)
        return found

    monkeypatch.setattr(LocalEngine, "generate", counting)
    stop_at = 0
    run(tmp_path, {"rl": stage}, "run=whole")
    assert len(reused) == 4 * calls
    assert [at % calls > 0 for at in range(len(reused))] == [n > 0 for n in reused], "a step begins with nothing kept"
    made.clear()
    stop_at = 3 * calls  # the last call of step 3, after the checkpoint of step 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {"rl": stage}, "run=parts")
    run(tmp_path, {"rl": stage}, "run=parts")
    assert left(tmp_path / "runs/whole") == left(tmp_path / "runs/parts")
