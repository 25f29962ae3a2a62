"""A class environment through the whole stage: credit by turn, saved rollouts, a lost process, resuming."""

from __future__ import annotations

import json

import pytest
from tiny_recipes import metrics, rollouts, run, weights

from rlpost.cli.app import app
from rlpost.errors import DataError, RecipeError, RewardError

SHOP = """
import os, random
from pathlib import Path

steps = 0

class Shop:
    def __init__(self, *, dies_at=0):
        self.dies_at = dies_at
    def reset(self, example):
        self.n = 0
        return example["prompt"] + random.choice("0123456789")
    def step(self, action):
        global steps
        self.n, steps = self.n + 1, steps + 1
        died = Path(__file__).with_name("died")
        if 0 < self.dies_at <= steps and not died.exists():
            died.touch()
            os._exit(1)
        return random.choice("+="), action.count("1"), self.n == 3, False, {"n": self.n}
"""
GRPO = {
    "kind": "grpo",
    "data": {"problems": {"task": {"fn": "addition.train"}, "limit": 64}},
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 4,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "checkpoint_every": 1,
    "environment": {"fn": "shop.py:Shop"},
    "max_turns": 4,
    "sampling": {"max_new_tokens": 16, "stop": list("=+023456789")},
    "rewards": [{"fn": "environment_reward"}],
    "advantage": {"fn": "process_normalised"},
    "max_length": 24,
    "table_every": 1,
}


@pytest.fixture(autouse=True)
def _shop(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)


def test_turns_are_rewarded_credited_saved_and_shown(tmp_path, capsys):
    run(tmp_path, {"grpo": GRPO})
    assert [line["step"] for line in metrics(tmp_path, "grpo")] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path, "grpo"))
    rows = rollouts(tmp_path, "grpo", 3)
    several = [c for row in rows for c in row["completions"] if len(c["steps"]) > 1]
    assert several
    for c in several:
        own = [m for m in c["messages"] if m["role"] == "assistant"]
        assert c["step_rewards"] == [m.get("reward", 0.0) for m in own]
        assert sum(c["step_rewards"]) == pytest.approx(c["reward"])
        assert sum(c["steps"]) == sum(c["action"])
    capsys.readouterr()
    app(["rollouts", str(tmp_path / "runs/run"), "--step", "2", "-n", "1"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "step-000002.jsonl: 4 prompts" in out
    assert "  (+" in out
    assert "environment: " in out
    best, worst = (float(line.split("reward ")[1].split(",")[0]) for line in out.splitlines() if "reward " in line)
    assert best >= worst


def test_rollouts_are_learned_from_again_with_the_rewards_of_their_turns(tmp_path):
    run(tmp_path, {"grpo": {**GRPO, "steps": 1}})
    recorded = {key: value for key, value in GRPO.items() if key not in ("environment", "max_turns", "rewards", "data")}
    recorded |= {"recorded": True, "steps": 1, "data": {"made": {"path": "runs/run/grpo/rollouts/step-000001.jsonl"}}}
    run(tmp_path, {"grpo": {**recorded, "rewards": [{"fn": "environment_reward"}]}}, "run=again")
    (first,), (again,) = metrics(tmp_path, "grpo"), metrics(tmp_path, "grpo", "again")
    assert again["reward"] == first["reward"]
    assert again["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    file = tmp_path / "runs/run/grpo/rollouts/step-000001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        for c in row["completions"]:
            c.pop("steps", None), c.pop("step_rewards", None)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="has no `steps`, and process_normalised credits steps - give step_end"):
        run(tmp_path, {"grpo": {**recorded}}, "run=without")


@pytest.mark.slow
def test_a_process_that_is_lost_changes_nothing_else(tmp_path):
    run(tmp_path, {"grpo": GRPO}, "run=whole", "stages.grpo.steps=1")
    environment = {"fn": "shop.py:Shop", "args": {"dies_at": 9}, "on_failure": "unscored"}
    run(tmp_path, {"grpo": {**GRPO, "environment": environment}}, "stages.grpo.steps=1")
    assert (tmp_path / "died").exists()
    pairs = [
        (a, b)
        for one, other in zip(rollouts(tmp_path, "grpo", 1), _rollouts(tmp_path, "whole"), strict=True)
        for a, b in zip(one["completions"], other["completions"], strict=True)
    ]
    assert sum(a["finish"] == "failed" for a, _ in pairs) == 1
    assert all(a["messages"] == b["messages"] for a, b in pairs if a["finish"] != "failed")


def _rollouts(folder, run):
    file = folder / f"runs/{run}/grpo/rollouts/step-000001.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_its_environment_ends_goes_on_bit_for_bit(tmp_path):
    environment = {"fn": "shop.py:Shop", "args": {"dies_at": 60}}
    with pytest.raises(RewardError, match=r"environment: .*exit"):
        run(tmp_path, {"grpo": {**GRPO, "environment": environment}})
    assert 0 < len(metrics(tmp_path, "grpo")) < 3
    again = run(tmp_path, {"grpo": {**GRPO, "environment": environment}})
    whole = run(tmp_path, {"grpo": GRPO}, "run=whole")
    found, expected = weights(again), weights(whole)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"environment": None}, r"rewards\[0\].fn: environment_reward is what a class environment gives - name one"),
        ({"step_end": "+"}, "step_end: the environment rewards turns, which are the steps then - remove it"),
        ({"environment": {"fn": "shop.py:Shop", "args": {"mark": "x"}}}, "args.mark: 'Shop' has no argument 'mark'"),
        ({"environment": {"fn": "shop.py:Shops"}}, "no function 'Shops' in .*did you mean 'Shop'"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_recipe_is_read(tmp_path, change, message):
    with pytest.raises(RecipeError, match=message):
        run(tmp_path, {"grpo": {**GRPO, **change}})
