"""A value network against an enumeration of real completions."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch
from tiny_recipes import SFT, policy, run

from rlpost.cli.app import main
from rlpost.errors import RecipeError
from rlpost.goals.calibration import compare
from rlpost.goals.goal_set import GoalSet
from rlpost.goals.unfold import unfold
from rlpost.policy.score import logprobs
from rlpost.types import Completion, Group


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a tiny policy and a value network of its endings."""
    folder = tmp_path_factory.mktemp("trained")
    value = {
        "kind": "value",
        "data": SFT["data"],
        "goals": {"texts": ["1", "2"]},
        "condition": "{goal}+",
        "steps": 2,
        "prompts_per_step": 4,
        "group_size": 4,
        "sampling": {"max_new_tokens": 3},
        "learning_rate": 1e-3,
        "max_length": 24,
    }
    run(folder, {"sft": SFT, "value": value})
    return folder / "runs/run"


def by_hand(model, prompt, goal, depth):
    """V at the prompt: the sum over every completion of its probability, straight from its log-probabilities."""
    (end,) = model.end_ids
    others = [t for t in range(model.vocabulary) if t != end]
    texts = [(*body, end) for n in range(depth) for body in itertools.product(others, repeat=n)]
    completions = tuple(Completion(t, (True,) * len(t)) for t in texts)
    logp = logprobs(model, [Group(prompt, completions)]).double()
    pieces = torch.split(logp, [len(t) for t in texts])
    return sum(float(p.sum().exp()) for t, p in zip(texts, pieces, strict=True) if goal.reached(t[:-1]))


def test_values_are_sums_over_completions(trained):
    model = policy(trained / "sft/final")
    prompt, goal = (5, 6, 7), GoalSet([(4,), (6, 5)])
    whole = unfold(model, prompt, 3, least=0.0)
    value_X = whole.values(goal)
    assert float(value_X[0]) == pytest.approx(by_hand(model, prompt, goal, 3), rel=1e-5)
    assert whole.left_out == pytest.approx(0, abs=1e-12)
    # A state's value is the prompt's with the state's tokens in it, where they are no part of a goal.
    at = whole.states.index((7,))
    assert float(value_X[at]) == pytest.approx(by_hand(model, (*prompt, 7), goal, 2), rel=1e-5)


def test_what_is_cut_off_counts_only_where_it_is_said(trained):
    model = policy(trained / "sft/final")
    whole = unfold(model, (5, 6), 2, least=0.0)
    everything = GoalSet([(t,) for t in range(model.vocabulary) if t not in model.end_ids])
    ended = whole.values(everything)
    either = whole.values(everything, truncated_counts=True)
    empty = whole.levels[0].logp_xV.exp()[0, list(model.end_ids)].sum()
    assert float(either[0]) == pytest.approx(1 - float(empty), rel=1e-9)
    assert float(ended[0]) < float(either[0]) - 0.01


def test_what_is_unlikely_is_left_out_and_bounds_the_error(trained):
    model, goal = policy(trained / "sft/final"), GoalSet([(4,)])
    whole, part = (unfold(model, (5, 6, 7), 3, least=x) for x in (0.0, 1e-3))
    assert len(part.states) < len(whole.states) / 2
    difference = float((whole.values(goal)[0] - part.values(goal)[0]).abs())
    assert 0 < difference <= part.left_out < 0.5


def test_too_many_completions_are_refused(trained):
    with pytest.raises(RecipeError, match="more than 100000 likely continuations"):
        unfold(policy(trained / "sft/final"), (5, 6), 6, least=0.0)


def test_measures_by_hand():
    true_X, learned_X = torch.tensor([0.5, 1.0, 0.0]).double(), torch.tensor([0.7, 0.95, 0.05]).double()
    found = compare(true_X, learned_X, torch.tensor([2.0, 1.0, 1.0]).double())
    assert found.mean_error == pytest.approx(0.5 * 0.2 + 0.5 * 0.05)
    assert found.root_mean_square == pytest.approx((0.5 * 0.04 + 0.5 * 0.0025) ** 0.5)
    assert found.largest == pytest.approx(0.2)
    # Three bins, each off by its own error; two states in one bin could cancel.
    assert found.calibration_error == pytest.approx(0.5 * 0.2 + 0.25 * 0.05 + 0.25 * 0.05)
    assert found.states == 3
    assert found.worth == pytest.approx(0.5 * 0.25 / (0.5 * 0.04 + 0.5 * 0.0025))
    one_bin = compare(true_X, torch.full((3,), 0.5).double(), torch.tensor([2.0, 1.0, 1.0]).double())
    assert one_bin.calibration_error == pytest.approx(0)
    assert one_bin.mean_error == pytest.approx(0.25)


def calibrate(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "goals", "calibrate", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command_asks_about_every_goal(trained, monkeypatch, capsys):
    words = [str(trained / "value"), "3+4=", "1+1=", "--goal", "1", "--goal", "3", "--max-new-tokens", "3"]
    assert calibrate(monkeypatch, *words, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["prompt"], x["goal"]) for x in found] == [("3+4=", "1"), ("3+4=", "3"), ("1+1=", "1"), ("1+1=", "3")]
    for x in found:
        assert 0 < x["found"]["true_root"] < 1
        assert x["found"]["mean_error"] <= x["found"]["largest"]
        assert x["found"]["mean_error"] <= x["found"]["root_mean_square"] + 1e-12
    assert calibrate(monkeypatch, *words) == 0
    assert "ECE" in capsys.readouterr().err


def test_a_policy_must_be_known(trained, monkeypatch, capsys, tmp_path):
    words = ["3+4=", "--goal", "1", "--max-new-tokens", "3"]
    assert calibrate(monkeypatch, str(trained / "sft"), *words) == 4
    assert "no value network" in capsys.readouterr().err
    assert calibrate(monkeypatch, str(tmp_path), *words) == 4
    assert "Traceback" not in capsys.readouterr().err
