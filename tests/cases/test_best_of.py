"""`sample --best-of --recipe`: rewards of every kind of stage, and the columns that they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import rlpost, save_model, save_recipe, save_rows

OWN = """
def vowels(completion):
    return float(len(completion.text))

def answer(completion, example):
    return float(example["answer"] in completion.text)

def by_step(steps, example):
    return [1.0 for _ in steps]
"""
KINDS = ["grpo", "ppo", "trpo", "online_dpo", "pairs", "step_labels", "evaluation"]


@pytest.fixture
def world(here: Path) -> Path:
    save_model(here / "m")
    save_rows(here / "d.jsonl", [{"prompt": "a", "answer": "b"}] * 2)
    (here / "my.py").write_text(OWN)
    return here


def recipe(kind: str, *rewards: str) -> Path:
    what: dict[str, Any] = {"data": {"c": {"path": "d.jsonl"}}, "rewards": [{"fn": fn} for fn in rewards]}
    made: dict[str, Any] = {"model": {"path": "m", "precision": "float32"}}
    if kind == "evaluation":
        made["evaluation"] = what
    else:
        trains = {} if kind in ("pairs", "step_labels") else {"steps": 1}
        kl = {"kl": {"beta": 0}} if kind == "online_dpo" else {}
        made["stages"] = {"s": {"kind": kind, **what, **trains, **kl}}
        if kind in ("grpo", "ppo", "online_dpo"):
            made["stages"]["s"]["learning_rate"] = 1e-3
    return save_recipe(Path("r.yaml"), made)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rewards_of_any_stage_choose(kind: str, world: Path, tally) -> None:
    recipe(kind, "my.py:vowels", "my.py:answer")
    words = ["sample", "m", "a", "--best-of", 3, "--recipe", "r.yaml", "--max-new-tokens", 4]
    ran = rlpost(*words, "--example", "answer=b", "--json")
    assert ran.code == 0, ran.err
    assert len(json.loads(ran.out)["completion"]) > 0
    tally("best of n by a recipe", right=1)


def test_a_column_that_a_reward_reads_is_asked_for_before_a_model_loads(world: Path, tally) -> None:
    for reward in ("my.py:answer", "math_answer", "addition.correct"):
        recipe("grpo", reward)
        ran = rlpost("sample", "no_such_model", "a", "--best-of", 3, "--recipe", "r.yaml")
        assert ran.refused(2, "stages.s.rewards[0]", "reads the column 'answer'", "--example answer=TEXT"), ran.err
        tally("best of n by a recipe", refused=1)


def test_recipes_and_words_that_cannot_choose(world: Path, tally) -> None:
    save_recipe(
        Path("r.yaml"), {"model": {"path": "m"}, "evaluation": {"data": {"c": {"path": "d.jsonl"}}, "rewards": []}}
    )
    words = ["sample", "m", "a", "--best-of", 3, "--recipe", "r.yaml"]
    assert rlpost(*words).refused(2, "rewards")
    recipe("grpo", "my.py:answer")
    assert rlpost(*words, "--example", "answer").refused(2, "--example: answer - write COLUMN=TEXT")
    assert rlpost(*words, "--example", "=b").refused(2, "--example")
    assert rlpost("sample", "m", "a", "--example", "answer=b").refused(2, "--example", "--recipe")
    recipe("grpo", "my.py:by_step")
    assert rlpost(*words).refused(2, "step_end")
    tally("best of n by a recipe", refused=5)
