"""A recipe with the reward `code`, from the command line: its rows are read before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import rlpost, save_model, save_recipe, save_rows

ROWS = [{"prompt": "a", "tests": ["assert f(1) == 1"]}, {"prompt": "b", "tests": [{"input": "", "output": "b"}]}]


def recipe(here: Path, rows: list[dict[str, Any]], **arguments: Any) -> Path:
    save_rows(here / "rows.jsonl", rows)
    stage = {
        "kind": "grpo",
        "data": {"train": {"path": "rows.jsonl"}},
        "rewards": [{"fn": "code", "args": arguments}, {"fn": "ends"}],
        "steps": 1,
        "prompts_per_step": 2,
        "group_size": 2,
        "sampling": {"max_new_tokens": 2},
        "learning_rate": 1e-4,
    }
    whole = {"model": {"path": str(save_model(here / "model"))}, "stages": {"grpo": stage}}
    return save_recipe(here / "recipe.yaml", whole)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_test_that_cannot_be_decided_stops_before_training(here: Path, flags: list[str], tally):
    ran = rlpost("train", recipe(here, [*ROWS, {"prompt": "c", "tests": ["assert f(1) == f(2)"]}]), *flags)
    assert ran.refused(3, "rows.jsonl:3", "code: tests[0]", "write one side as a value"), ran
    assert not (here / "runs").exists()
    tally("tests of programs", refused=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"level": "chroot"}, ("stages.grpo.rewards[0].args", "no level 'chroot'")),
        ({"deadline": 0}, ("stages.grpo.rewards[0].args", "deadline is 0")),
        ({"memory": 1}, ("stages.grpo.rewards[0].args", "memory is 1 MiB")),
    ],
)
def test_a_sandbox_that_is_not_to_be_had_stops_before_training(here: Path, arguments: Any, words: Any, tally):
    """A second each."""
    ran = rlpost("train", recipe(here, ROWS, **arguments))
    assert ran.refused(2, *words), ran
    tally("tests of programs", refused=1)


@pytest.mark.slow
def test_a_run_is_rewarded_by_programs(here: Path):
    """Five seconds."""
    ran = rlpost("train", recipe(here, ROWS))
    assert ran.code == 0, ran
    (step,) = [json.loads(line) for line in next((here / "runs").rglob("metrics.jsonl")).read_text().splitlines()]
    assert step["reward/code"] == 0
