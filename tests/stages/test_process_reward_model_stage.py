"""Process reward models: labels of steps on the steps' last actions, and a mean over all steps of the update."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_recipes import GRPO, LORA, base, jsonl, metrics, run, sha256
from value_head_models import EVERYTHING, assert_only_the_right_weights_moved, gradient, make_model, saved

from rlpost.objectives.reward_model import process_reward
from rlpost.policy.judge import RewardModelJudge
from rlpost.policy.value_head import Values
from rlpost.stages.process_reward_model import step_loss, weighted
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
ROWS = [
    {"prompt": f"{a}+{b}=", "steps": [f"{a}+", f"{b}=", f"{(a + b) % 10}"], "labels": [1.0, 1.0, 1.0]}
    for a in range(2)
    for b in range(3)
] + [
    {"prompt": f"{a}+{b}=", "steps": [f"{a}+", "9=", "0"], "labels": [1.0, 0.0, 0.0]}
    for a in range(2)
    for b in range(3)
]
STEPS = {
    "kind": "process_reward_model",
    "data": {"rows": {"path": "steps.jsonl"}},
    "steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "max_length": 16,
}


def stepped(*lengths: int, first: int = 5, reads: int = 0, labels=()) -> Completion:
    """Steps of so many actions, after the first of which an environment says something."""
    acts = [[True] * n for n in lengths]
    action = [*acts[0], *[False] * reads, *(a for step in acts[1:] for a in step)] if acts else [False] * reads
    return Completion(tuple(range(first, first + len(action))), tuple(action), steps=lengths, step_labels=labels)


GROUPS = [
    Group((5, 6), (stepped(2, 1, 3, first=8, labels=[1.0, 0.0, 0.5]),)),
    Group((7,), (stepped(1, reads=2, first=20, labels=[0.0]),)),
    Group((8, 9, 10), (stepped(2, 2, reads=3, first=30, labels=[1.0, 0.0]),)),
    Group((11,), (stepped(reads=2, first=40),)),
    Group((12,), (stepped(4, first=50, labels=[1.0]),)),
]


def test_labels_and_weights_are_on_the_last_action_of_each_step():
    update = weighted(Experience(tuple(GROUPS[:3])))
    assert update["label"].nan_to_num(-1).tolist() == [-1, 1, 0, -1, -1, 0.5, 0, -1, 1, -1, 0]
    assert (6 * update["weight"]).tolist() == [0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]


def test_the_loss_by_hand():
    update = weighted(Experience(tuple(GROUPS[:2])))
    after_N = torch.tensor([9.0, 2.0, -1.0, 9.0, 9.0, 0.5, 1.0], dtype=torch.float64)
    total, line = step_loss(process_reward)(Values(after_N, after_N, torch.zeros(2)), update)

    def entropy(logit: float, label: float) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -label * math.log(p) - (1 - label) * math.log(1 - p)

    expected = [entropy(2.0, 1.0), entropy(-1.0, 0.0), entropy(0.5, 0.5), entropy(1.0, 0.0)]
    assert float(total) == pytest.approx(sum(expected) / 4, abs=1e-9)
    assert line["accuracy"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert line["label"].tolist() == [1.0, 0.0, 0.5, 0.0]
    assert line["predicted"][0] == pytest.approx(1 / (1 + math.exp(-2.0)))


@pytest.mark.parametrize("lora", [False, True])
def test_the_gradient_does_not_depend_on_how_the_update_is_cut(lora):
    model = make_model(lora)
    loss = step_loss(process_reward)
    whole, line = gradient(model, GROUPS, weighted, loss, EVERYTHING, whole_groups=False)
    assert float(whole.norm()) > 1e-3
    for budget in (1, 16, 24):
        cut, other = gradient(model, GROUPS, weighted, loss, budget, whole_groups=False)
        assert float((cut - whole).norm() / whole.norm()) < 1e-12
        assert other == pytest.approx(line, abs=1e-9)
    turned, _ = gradient(model, GROUPS[::-1], weighted, loss, 16, whole_groups=False)
    assert float((turned - whole).norm() / whole.norm()) < 1e-12


@LORA_OR_NOT
def test_it_learns_which_steps_are_right_and_moves_nothing_else(tmp_path, lora):
    jsonl(tmp_path / "steps.jsonl", ROWS)
    settings = {**STEPS, "steps": 30, "batch_size": len(ROWS)}
    assert run(tmp_path, {"steps": settings}, *lora) == base(tmp_path)  # the policy passes unchanged
    first, *_, last = metrics(tmp_path, "steps")
    assert first["loss"] == pytest.approx(math.log(2), abs=0.3)
    assert first["label"] == pytest.approx(2 / 3)
    assert last["loss"] < 0.3
    assert last["accuracy"] > 0.9
    assert last["predicted"] == pytest.approx(last["label"], abs=0.1)
    assert_only_the_right_weights_moved(tmp_path, "steps", bool(lora))
    names = {"step", "loss", "accuracy", "predicted", "label", "grad_norm", "learning_rate"}
    assert set(first) == names


def test_a_judge_says_what_it_has_learned(tmp_path):
    jsonl(tmp_path / "steps.jsonl", ROWS)
    run(tmp_path, {"steps": {**STEPS, "steps": 30, "batch_size": len(ROWS)}})
    model = saved(tmp_path / "runs/run/steps/final")
    tokenizer = model.trunk.tokenizer
    texts = ["".join(row["steps"]) for row in (ROWS[0], ROWS[6])]
    ids = [(*tokenizer.encode(text), tokenizer.eos_token_id) for text in texts]
    divided = [Completion(i, (True,) * len(i), t, "stop", steps=(2, 2, 2)) for i, t in zip(ids, texts, strict=True)]
    group = Group(tuple(tokenizer.encode(ROWS[0]["prompt"])), tuple(divided))
    right, wrong = RewardModelJudge(model, tokenizer).step_scores([group], "=")
    assert min(right) > 0.6
    assert wrong[0] > 0.6
    assert max(wrong[1:]) < 0.4


def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, monkeypatch):
    jsonl(tmp_path / "steps.jsonl", ROWS)
    stages = {"steps": {**STEPS, "steps": 6, "checkpoint_every": 2}}
    run(tmp_path, stages, "run=whole")
    update = Learner.update

    def failing(self, *args, **kwargs):
        if self.updates == 3:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages)
    run(tmp_path, stages)
    for file in ("final/model.safetensors", "final/scalar_head.safetensors", "metrics.jsonl"):
        paths = [tmp_path / "runs" / name / "steps" / file for name in ("run", "whole")]
        assert sha256(paths[0]) == sha256(paths[1]), file


@LORA_OR_NOT
def test_a_later_stage_is_rewarded_by_it(tmp_path, lora):
    jsonl(tmp_path / "steps.jsonl", ROWS)
    reward = {"fn": "process_reward_model", "model": "steps", "args": {"reduce": "mean", "step_end": "="}}
    run(tmp_path, {"steps": STEPS, "grpo": {**GRPO, "steps": 1, "rewards": [reward]}}, *lora)
    (line,) = metrics(tmp_path, "grpo")
    assert 0 < line["reward/process_reward_model"] < 1


def test_every_step_of_a_later_stages_samples_is_credited_with_its_own_probability(tmp_path):
    jsonl(tmp_path / "steps.jsonl", ROWS)
    later = {
        **GRPO,
        "steps": 1,
        "rewards": [{"fn": "process_steps", "model": "steps"}],
        "advantage": {"fn": "process_normalised"},
        "step_end": "=",
    }
    run(tmp_path, {"steps": STEPS, "grpo": later}, LORA)
    (line,) = metrics(tmp_path, "grpo")
    assert line["reward/process_steps"] > 0
    assert line["grad_norm"] > 0
