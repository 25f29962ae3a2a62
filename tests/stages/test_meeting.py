"""Stages whose policy meets another one: who is sampled, what is compared with what, and what a resumed run does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moved import assert_same_result, fail_after
from tiny_recipes import GRPO, LORA, base, metrics, policy, prepared, run
from torch import Tensor

from rlpost.errors import RecipeError
from rlpost.policy.logprobs import PolicyOutput
from rlpost.policy.score import logprobs
from rlpost.rewards.score import RewardBatch
from rlpost.stages.meeting import Meeting, Met, contested
from rlpost.stages.online_dpo import exploring, pairs_of_two
from rlpost.stages.params import Contest
from rlpost.stages.rollouts import rollout_of
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

NAN = float("nan")
NASH: dict[str, Any] = {**GRPO, "against": {"share": 0.5}, "advantage": {"fn": "leave_one_out"}, "learning_rate": 3e-2}
XPO: dict[str, Any] = {
    **GRPO,
    "kind": "online_dpo",
    "prompts_per_step": 8,
    "group_size": 2,
    "against": {"share": 1.0},
    "explore": 0.1,
    "learning_rate": 1e-2,
    "schedule": "constant",
}


def rollout(first: int, rewards: list[list[float | None]]):
    groups = [
        Group((p,), tuple(Completion((first + i, 9), (True, True)) for i in range(len(row))))
        for p, row in enumerate(rewards)
    ]
    return rollout_of(groups, RewardBatch(total=rewards, by_name={}), {}, False)


def met(own: list[list[float | None]], others: list[list[float | None]]) -> Met:
    return Met(**vars(rollout(10, own)), others=rollout(20, others))


def test_each_completion_is_paired_with_one_of_the_other_policys():
    samples = met([[1.0, 0.0, 2.0, None]], [[0.0, 0.5, 2.0, 1.0]])
    pairs, whose = pairs_of_two(samples, 0.0)
    assert [[c.ids[0] for c in g.completions] for g in pairs] == [[10, 20], [21, 11]]
    assert whose == [False, True, True, False]
    assert pairs_of_two(samples, 0.5)[1] == [False, True]
    same = replace(samples, others=rollout(10, [[0.0, 0.0, 0.0, 0.0]]))
    assert pairs_of_two(same, 0.0) == ([], [])


def test_a_reward_is_how_likely_it_is_preferred():
    samples = met([[1.0, 0.0], [3.0, None]], [[0.0, 1.0], [1.0, 1.0]])
    found = contested(samples, Contest(preference="step")).reward_PG
    assert found.nan_to_num(-1).tolist() == [[0.75, 0.25], [1.0, -1.0]]
    scaled = contested(samples, Contest(scale=2.0)).reward_PG
    half = torch.sigmoid(torch.tensor(0.5, dtype=torch.float64)).item()
    assert scaled[0, 0].item() == pytest.approx((half + 0.5) / 2)
    assert contested(samples, None) is samples
    assert samples.metrics["win_rate"] == pytest.approx(2 / 3)
    assert samples.metrics["met/reward"] == 0.75


def test_a_completion_that_meets_none_with_a_reward_is_not_learned_from():
    samples = met([[1.0, 0.0], [3.0, 0.0]], [[None, None], [1.0, None]])
    found = contested(samples, Contest())
    assert found.reward_PG.isnan().tolist() == [[True, True], [False, False]]
    assert [c.actions for g in found.learned for c in g.completions] == [0, 0, 2, 2]
    assert found.experience.rows.learned == 2


def test_the_bonus_is_a_mean_over_pairs_of_the_other_policys_log_probability():
    pairs, whose = pairs_of_two(met([[1.0, 0.0]], [[0.0, 1.0]]), 0.0)
    part = Experience(tuple(pairs)).with_groups(pair_weight=torch.full((2,), 0.5))
    part = part.with_actions(met=part.rows.spread(torch.tensor(whose)))
    logp_N = -torch.arange(1.0, 9.0).requires_grad_()

    def none(output: PolicyOutput, _: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        return output.logp_N.sum() * 0, {}

    total, line = exploring(none, 0.2)(PolicyOutput(logp_N), part)
    # Actions 3 and 4 are the other's of the first pair, 5 and 6 of the second.
    assert line["met_logp"].tolist() == [-7.0, -11.0]
    assert total.item() == pytest.approx(0.2 * (-7 - 11) / 2)
    assert exploring(none, 0.0) is none


@pytest.mark.parametrize(
    "lora", [pytest.param((), id="full"), pytest.param((LORA,), id="lora", marks=pytest.mark.slow)]
)
def test_the_other_policy_stays_where_the_stage_began(tmp_path, monkeypatch, lora):
    """Its samples have the start's log-probabilities after the policy has moved, and other seeds each step."""
    seen: list[Met] = []
    sample = Meeting.sample
    monkeypatch.setattr(Meeting, "sample", lambda self, step: seen.append(sample(self, step)) or seen[-1])
    run(tmp_path, {"online": {**XPO, "steps": 2}}, *lora)
    start = policy(base(tmp_path))
    for samples in seen:
        said = torch.tensor([x for g in samples.others.groups for c in g.completions for x in c.logprobs])
        assert torch.allclose(said, logprobs(start, samples.others.groups), atol=1e-4)
        assert all(len(g.completions) == 2 for g in samples.others.groups)
    assert metrics(tmp_path, "online")[0]["grad_norm"] > 0
    own = torch.tensor([x for g in seen[1].groups for c in g.completions for x in c.logprobs])
    assert not torch.allclose(own, logprobs(start, seen[1].groups), atol=1e-3)
    assert [g.completions[0].ids.tolist() for g in seen[0].groups] != [
        g.completions[0].ids.tolist() for g in seen[0].others.groups
    ]
    assert {"win_rate", "met/reward", "met_logp", "pairs"} < set(metrics(tmp_path, "online")[0])


@pytest.mark.slow
def test_a_contest_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    stage = {**NASH, "steps": 3, "checkpoint_every": 1, "kl": {"beta": 0.1}, "table_every": 0}
    run(tmp_path, {"nash": stage}, "run=whole")
    with monkeypatch.context() as patch:
        fail_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, {"nash": stage})
    run(tmp_path, {"nash": stage})
    assert_same_result(tmp_path, "nash", lora=False)
    line = metrics(tmp_path, "nash")[0]
    assert 0 < line["win_rate"] < 1
    assert line["grad_norm"] > 0


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {**NASH, "rollouts": {"engine": "vllm"}},
            "against: the local engine reads the reference's logits .*=vllm - use",
        ),
        ({**NASH, "rollouts": {"staleness": 1}}, "against: the local engine reads .*with rollouts.staleness - use"),
        ({**NASH, "tools": [{"fn": "calculator"}]}, "against: completions of a single turn are compared .*x.tools"),
        ({**NASH, "recorded": True}, "against: recorded rollouts are all there is"),
        (
            {**NASH, "advantage": {"fn": "greedy_baseline"}},
            "advantage.fn: greedy_baseline asks for rewards by themselves",
        ),
        ({**NASH, "against": {"share": 0}}, "against.share: expected"),
        ({**NASH, "against": {"scale": 0}}, "against.scale: expected"),
        ({**NASH, "against": {"preference": "step", "scale": 3.0}}, "against.scale: is for preference=bradley_terry"),
        ({**XPO, "against": None}, "explore: is of another policy's completions - give stages.x.against"),
        ({**XPO, "against": {"scale": 1.0}}, "against.scale: unknown"),
        ({**XPO, "environment": {"fn": "duel.py:reply"}}, "against: completions of a single turn .*x.environment"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, stage, message):
    (tmp_path / "duel.py").write_text("def reply(text):\n    return None\n")
    with pytest.raises(RecipeError, match=rf"stages\.x\.{message}"):
        prepared(tmp_path, {"x": stage})


def test_one_completion_of_each_makes_a_pair(tmp_path):
    assert prepared(tmp_path, {"x": {**XPO, "group_size": 1}}).config.stages["x"].group_size == 1


def test_weights_in_shards_are_refused(tmp_path):
    context, cfg = SimpleNamespace(shards=object(), name="x"), prepared(tmp_path, {"x": XPO}).config.stages["x"]
    with pytest.raises(RecipeError, match=r"stages\.x\.against: the reference's logits are not read from weights"):
        Meeting(context, cfg, None, object())
