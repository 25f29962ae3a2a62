"""Self-play: which version of the policy plays against it, with what weights, and what a resumed run does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from engines import local
from moved import assert_same_result, fail_after
from stubs import tiny_policy
from tiny_recipes import GRPO, LORA, SFT, metrics, prepared, rollouts, run

from rlpost.engine.params import Sampling
from rlpost.environments.played import Asked
from rlpost.errors import RecipeError, RewardError
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model, Precision
from rlpost.policy.policy import Policy
from rlpost.stages.params import Opponents
from rlpost.stages.self_play import LATEST, PastVersions
from rlpost.types import Request

DUEL = '''
class Alone:
    """The more ones the better."""

    def reset(self, example):
        self.own = None
        return "1+1="

    def step(self, action):
        return None, action.count("1"), True, False, {}


class Duel(Alone):
    """Who writes more ones wins."""

    def step(self, action):
        self.own = action
        return None, None, False, False, {}

    def other(self):
        return None if self.own is None else "1+1="

    def step_other(self, action):
        won = self.own.count("1") - action.count("1")
        return None, float((won > 0) - (won < 0)), True, False, {"other": action}


def reply(text):
    return None
'''
PLAY: dict[str, Any] = {
    **GRPO,
    "environment": {"fn": "duel.py:Duel"},
    "rewards": [{"fn": "environment_reward"}],
    "opponents": {"pool_size": 2, "snapshot_every": 1, "latest_ratio": 0.25},
    "learning_rate": 3e-2,
}
SAMPLING = Sampling(max_new_tokens=6)


def pool_of(policy: Policy, **settings: Any) -> PastVersions:
    return PastVersions(Opponents(**settings), policy, local(policy), SAMPLING)


def moved(policy: Policy, seed: int) -> None:
    """Other weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in policy.trained().values():
            p.add_(torch.randn_like(p), alpha=0.3)


def test_versions_enter_the_pool_and_the_oldest_leaves_it():
    policy = tiny_policy(eos=0)
    pool = pool_of(policy, pool_size=2, snapshot_every=3)
    seen = []
    for step in range(8):
        pool.begin(step)
        seen.append(pool.steps)
    assert seen == [(0,), (0,), (0,), (0, 3), (0, 3), (0, 3), (3, 6), (3, 6)]


def test_each_opponent_samples_with_its_own_weights_and_the_policy_keeps_its_own(tmp_path):
    folder = run(tmp_path, {"sft": {**SFT, "steps": 1}})
    policy = load_policy(folder, Model(precision=Precision.float32))
    assert policy.fused  # the engine has weights of its own, packed
    pool = pool_of(policy, pool_size=2, snapshot_every=1, latest_ratio=0.4)
    asked = [Asked([1, 2, 3 + i % 3], seed=i, prompt_seed=100 + i // 2) for i in range(16)]
    expected: dict[int | None, list[str]] = {}

    def sampled() -> list[str]:
        requests = [Request(a.prompt, 1, SAMPLING, a.seed) for a in asked]
        return [turn.text for (turn,) in local(policy).generate(requests)]

    for step in range(3):
        moved(policy, step)
        before = {name: p.detach().clone() for name, p in policy.trained().items()}
        pool.begin(step)
        expected[step] = expected[LATEST] = sampled()
        versions = [pool.chosen(a.prompt_seed) for a in asked]
        for _ in range(2):
            assert pool.answer(asked) == [expected[v][i] for i, v in enumerate(versions)]
        assert all(torch.equal(p, before[name]) for name, p in policy.trained().items())
    newest = pool_of(policy, latest_ratio=1.0)
    for step in range(2):
        moved(policy, 3 + step)
        newest.begin(step)
        assert newest.answer(asked) == sampled()
    with torch.no_grad():
        for name, p in policy.trained().items():
            p.copy_(before[name])
    assert set(versions) == {LATEST, 1, 2}
    assert versions[::2] == versions[1::2]  # by the prompt
    assert pool.answer(asked[5:9]) == pool.answer(asked)[5:9]
    assert expected[1] != expected[2]
    restored = pool_of(policy, pool_size=2, latest_ratio=0.4)
    restored.load_weights(pool.weights())
    assert restored.answer(asked) == pool.answer(asked)


def test_the_policy_has_its_weights_again_after_a_failure():
    policy = tiny_policy(eos=0)
    pool = pool_of(policy, latest_ratio=0.0)
    pool.begin(0)
    moved(policy, 1)
    before = {name: p.detach().clone() for name, p in policy.trained().items()}
    pool._engine.generate = lambda requests: 1 / 0
    with pytest.raises(ZeroDivisionError):
        pool.answer([Asked([1], 0, 0)])
    assert all(torch.equal(p, before[name]) for name, p in policy.trained().items())
    with pytest.raises(RewardError, match=f"`other` asks with {policy.max_positions} tokens"):
        pool.answer([Asked([1] * policy.max_positions, 0, 0)])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_how_often_the_latest_plays_and_each_version_of_the_pool(ratio):
    pool = pool_of(tiny_policy(eos=0), pool_size=3, snapshot_every=1, latest_ratio=ratio)
    for step in range(3):
        pool.begin(step)
    found = Counter(pool.chosen(seed) for seed in range(4000))
    assert found[LATEST] / 4000 == pytest.approx(ratio, abs=0.03)
    for step in range(3):
        assert found[step] / 4000 == pytest.approx((1 - ratio) / 3, abs=0.03)


@pytest.mark.parametrize("lora", [(), pytest.param((LORA,), marks=pytest.mark.slow)], ids=["full", "lora"])
def test_killed_between_two_versions_it_ends_as_if_it_had_gone_through(tmp_path, lora, monkeypatch):
    """After step 3, from which it goes on, one of the two opponents is the policy of step 2."""
    (tmp_path / "duel.py").write_text(DUEL)
    stages = {"sft": SFT, "grpo": {**PLAY, "steps": 5, "checkpoint_every": 3}}
    run(tmp_path, stages, *lora, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(4, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages, *lora)
    assert len(metrics(tmp_path, "grpo")) == 4
    run(tmp_path, stages, *lora)
    assert_same_result(tmp_path, "grpo", lora=bool(lora))
    games = [c["messages"] for g in rollouts(tmp_path, "grpo", 5) for c in g["completions"] if c["finish"] == "stop"]
    assert len(games) > 1
    for own, other in games:
        assert (own["role"], other["role"]) == ("assistant", "opponent")
        assert own["info"] == {"other": other["content"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"fn": "duel.py:Alone"}}, "opponents: there is no second player"),
        ({"environment": {"fn": "duel.py:reply"}, "rewards": [{"fn": "length"}]}, "there is no second player"),
        ({"environment": {"fn": "calculator.reply"}, "rewards": [{"fn": "length"}]}, "there is no second player"),
        ({"rollouts": {"staleness": 1}}, "and not with rollouts.staleness - use engine: local"),
        ({"rollouts": {"engine": "vllm"}}, "and not with rollouts.engine=vllm - use engine: local"),
    ],
)
def test_what_has_no_second_player_or_another_engine_is_refused(tmp_path, changes, message):
    (tmp_path / "duel.py").write_text(DUEL)
    with pytest.raises(RecipeError, match=message) as refused:
        prepared(tmp_path, {"sft": SFT, "grpo": {**PLAY, **changes}})
    assert "stages.grpo.opponents" in str(refused.value)


def test_a_game_without_opponents_says_so(tmp_path):
    (tmp_path / "duel.py").write_text(DUEL)
    with pytest.raises(RewardError, match="asks an opponent, and there is none"):
        run(tmp_path, {"sft": SFT, "grpo": {**PLAY, "opponents": None, "steps": 1}})
