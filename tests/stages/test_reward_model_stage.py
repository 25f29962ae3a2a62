"""Reward models: what they learn, what moves with them, and that an update is one whatever its parts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_recipes import GRPO, LORA, PREFERENCES, SFT, base, group, jsonl, metrics, run, sha256, weights
from torch import Tensor
from value_head_models import EVERYTHING, assert_only_the_right_weights_moved, gradient, make_model, saved

from rlpost.objectives.reward_model import bradley_terry, plackett_luce
from rlpost.objectives.weights import pair_mean
from rlpost.policy.value_head import Values
from rlpost.stages.reward_model import pair_rewards, ranked_rewards, score_loss, weighted
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
REWARD = {
    "kind": "reward_model",
    "data": {"pairs": {"path": "pairs.jsonl"}},
    "steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "max_length": 16,
}


def completion(*ids: int) -> Completion:
    return Completion(ids, (True,) * len(ids))


def scored(score: float | None, *ids: int) -> Completion:
    return replace(completion(*ids), score=score)


PAIRS = [
    Group((5, 6, 7), (completion(8, 9, 10), completion(11)), {"margin": 0.5}),
    Group((12,), (completion(13, 14), completion(15, 16, 17, 18)), {}),
    Group((19, 20), (completion(), completion(21, 22)), {"margin": None}),
    Group((23, 24, 25, 26), (completion(27), completion(28, 29)), {"margin": 2}),
]
RANKED = [
    Group((5, 6, 7), (scored(0.5, 8, 9), scored(2.0, 10), scored(-1.0, 11, 12, 13))),
    Group((14,), (scored(0.0, 15, 16), scored(1.0, 17))),
    Group((18, 19), (scored(1.0, 20), scored(None, 21, 22), scored(1.0, 23))),
    Group((24,), (scored(3.0, 25), scored(1.0, 26), scored(4.0, 27), scored(1.0, 28, 29))),
]


def values(*final: float) -> Values:
    return Values(torch.zeros(0), torch.zeros(0), torch.tensor(final, dtype=torch.float64))


def as_update(groups) -> Experience:
    return Experience(tuple(groups)).with_groups(weight=pair_mean(len(groups)))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_the_loss_of_pairs_by_hand():
    total, line = score_loss(bradley_terry)(values(2.0, 1.0, 0.0, 0.5), as_update(PAIRS[:2]))
    expected = -(log_sigmoid(2.0 - 1.0 - 0.5) + log_sigmoid(-0.5)) / 2
    assert float(total) == pytest.approx(expected, abs=1e-9)
    assert line["accuracy"].tolist() == [1.0, 0.0]
    assert line["margin"].tolist() == [1.0, -0.5]
    assert line["score"].tolist() == [2.0, 1.0, 0.0, 0.5]


def test_centring_is_an_argument_of_the_recipe():
    centred = score_loss(partial(bradley_terry, centre=0.1))(values(2.0, 1.0, 0.0, 0.5), as_update(PAIRS[:2]))[0]
    plain = score_loss(bradley_terry)(values(2.0, 1.0, 0.0, 0.5), as_update(PAIRS[:2]))[0]
    assert float(centred - plain) == pytest.approx(0.1 * (3.0**2 + 0.5**2) / 2)


def test_a_function_is_told_what_it_asks_for_by_name():
    def sums(reward_PK: Tensor, score_P2: Tensor) -> Tensor:
        return score_P2.sum(1) + 10 * reward_PK.sum(1)

    total, _ = score_loss(sums)(values(2.0, 1.0, 0.0, 0.5), as_update(PAIRS[:2]))
    assert float(total) == pytest.approx((3.0 + 10 + 0.5 + 10) / 2)


def test_groups_of_different_sizes_are_filled_up_with_unscored():
    seen = {}

    def record(score_PK: Tensor, reward_PK: Tensor) -> Tensor:
        seen.update(score=score_PK, reward=reward_PK)
        return score_PK.sum(1)

    score_loss(record)(values(0, 1, 2, 3, 4), as_update(RANKED[:2]))
    assert seen["score"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 0.0]]
    assert seen["reward"].nan_to_num(9.0).tolist() == [[0.5, 2.0, -1.0], [0.0, 1.0, 9.0]]


def test_scores_of_a_row_mean_nothing_to_a_loss_of_pairs():
    assert ranked_rewards(PAIRS[0]) == pair_rewards(PAIRS[0]) == [1.0, 0.0]
    pair = Group((5,), (scored(0.0, 8), scored(1.0, 11)), {"scores": "high, low"})
    total, _ = score_loss(bradley_terry)(values(2.0, 1.0), as_update([pair]))
    assert float(total) == pytest.approx(-log_sigmoid(1.0))


def test_what_fills_a_group_up_changes_nothing():
    loss = score_loss(plackett_luce)
    both, line = loss(values(0.5, 1.0, -1.0, 2.0, 1.0), as_update(RANKED[:2]))
    three, _ = loss(values(0.5, 1.0, -1.0), as_update(RANKED[:1]))
    two, _ = loss(values(2.0, 1.0), as_update(RANKED[1:2]))
    assert float(both) == pytest.approx(float(three + two) / 2, abs=1e-9)
    # 1.0 > 0.5, 0.5 > -1, 1.0 > -1, and 1.0 > 2.0 of the second.
    assert sorted(line["margin"].tolist()) == [-1.0, 0.5, 1.5, 2.0]
    assert float(line["accuracy"].mean()) == 0.75


def test_completions_of_equal_or_unknown_reward_are_compared_with_nothing():
    _, line = score_loss(plackett_luce)(values(0.5, 1.0, -1.0), as_update(RANKED[2:3]))
    assert len(line["margin"]) == 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("function", "groups"), [(bradley_terry, PAIRS), (plackett_luce, RANKED)])
def test_the_gradient_does_not_depend_on_how_the_update_is_cut(function, groups, lora):
    model = make_model(lora)
    loss = score_loss(function)
    whole, line = gradient(model, groups, weighted, loss, EVERYTHING, whole_groups=True)
    assert float(whole.norm()) > 1e-3
    for budget in (1, 16, 30):
        cut, other = gradient(model, groups, weighted, loss, budget, whole_groups=True)
        assert float((cut - whole).norm() / whole.norm()) < 1e-12
        assert other == pytest.approx(line, abs=1e-9)
    turned, _ = gradient(model, groups[::-1], weighted, loss, 16, whole_groups=True)
    assert float((turned - whole).norm() / whole.norm()) < 1e-12


def scores(folder, rows=PREFERENCES) -> Tensor:
    """[P, 2] what a checkpoint thinks of the preferences."""
    model = saved(folder)
    groups = [group(model.trunk, r["prompt"], r["chosen"], r["rejected"]) for r in rows]
    return model.score(groups).final_S.view(-1, 2)


@LORA_OR_NOT
def test_it_learns_what_is_preferred_and_moves_nothing_else(tmp_path, lora):
    settings = {**REWARD, "steps": 25, "batch_size": len(PREFERENCES)}
    assert run(tmp_path, {"reward": settings}, *lora) == base(tmp_path)  # the policy passes unchanged
    first, *_, last = metrics(tmp_path, "reward")
    assert first["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert last["loss"] < 0.2
    assert last["accuracy"] == 1.0
    final = tmp_path / "runs/run/reward/final"
    score_P2 = scores(final)
    assert bool((score_P2[:, 0] > score_P2[:, 1]).all())
    assert_only_the_right_weights_moved(tmp_path, "reward", bool(lora))
    names = {"step", "loss", "accuracy", "margin", "score", "grad_norm", "learning_rate"}
    assert set(first) == names


def test_what_comes_after_starts_from_the_policy(tmp_path):
    run(tmp_path, {"sft": {**SFT, "steps": 1}, "reward": REWARD, "again": {**SFT, "steps": 1}})
    runs = tmp_path / "runs/run"
    without = {"sft": {**SFT, "steps": 1}, "again": {**SFT, "steps": 1}}
    run(tmp_path, without, "run=without")
    ours, theirs = weights(runs / "again/final"), weights(tmp_path / "runs/without/again/final")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_margins_of_rows_are_part_of_the_loss(tmp_path):
    jsonl(tmp_path / "margins.jsonl", [{**row, "margin": 3.0} for row in PREFERENCES])
    settings = {**REWARD, "data": {"pairs": {"path": "margins.jsonl"}}, "steps": 1, "batch_size": len(PREFERENCES)}
    run(tmp_path, {"reward": settings})
    run(tmp_path, {"reward": {**settings, "data": REWARD["data"]}}, "run=without")
    (with_margin,), (without,) = (metrics(tmp_path, "reward", name) for name in ("run", "without"))
    assert without["margin"] == pytest.approx(with_margin["margin"], abs=1e-6)
    assert with_margin["loss"] > without["loss"] + 1.5


def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, monkeypatch):
    stages = {"reward": {**REWARD, "steps": 6, "checkpoint_every": 2}}
    run(tmp_path, stages, LORA, "run=whole")
    update = Learner.update

    def failing(self, *args, **kwargs):
        if self.updates == 3:
            raise KeyboardInterrupt
        return update(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages, LORA)
    run(tmp_path, stages, LORA)
    for file in ("final/adapter_model.safetensors", "final/scalar_head.safetensors", "metrics.jsonl"):
        paths = [tmp_path / "runs" / name / "reward" / file for name in ("run", "whole")]
        assert sha256(paths[0]) == sha256(paths[1]), file


def test_rankings_are_learned_whole(tmp_path):
    answers = [[f"{(a + b) % 10}{a}", f"{(a + b) % 10}", f"{(a + b + 1) % 10}"] for a in range(2) for b in range(2)]
    prompts = [f"{a}+{b}=" for a in range(2) for b in range(2)]
    rows = [
        # One group is shorter; an answer nobody scored has no part in it.
        {"prompt": p, "completions": x[: 3 - i % 2], "scores": [2.0, 1.0, None if i == 2 else 0.0][: 3 - i % 2]}
        for i, (p, x) in enumerate(zip(prompts, answers, strict=True))
    ]
    jsonl(tmp_path / "ranked.jsonl", rows)
    settings = {**REWARD, "data": {"ranked": {"path": "ranked.jsonl"}}, "loss": {"fn": "plackett_luce"}, "steps": 30}
    run(tmp_path, {"reward": settings})
    first, *_, last = metrics(tmp_path, "reward")
    # log 3! for three, log 2 for two.
    assert first["loss"] == pytest.approx((math.log(6) + 3 * math.log(2)) / 4, abs=0.3)
    assert last["loss"] < 0.3
    assert last["accuracy"] == 1.0


@LORA_OR_NOT
def test_a_later_stage_is_rewarded_by_it(tmp_path, lora):
    rewarded = {**GRPO, "steps": 1, "rewards": [{"fn": "reward_model", "model": "reward"}]}
    run(tmp_path, {"reward": REWARD, "grpo": rewarded}, *lora)
    (line,) = metrics(tmp_path, "grpo")
    assert line["reward"] == pytest.approx(line["reward/reward_model"])
    final = tmp_path / "runs/run/grpo/final"
    assert len(list(final.glob("*.safetensors"))) == 1
    assert not any("reward" in name for name in weights(final))
