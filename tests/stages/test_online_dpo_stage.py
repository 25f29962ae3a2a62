"""Online DPO: pairs of fresh samples, ranked by reward."""

from __future__ import annotations

import math

import pytest
import torch
from moved import assert_only_the_policy_moved, assert_same_result, fail_after, keep_references
from tiny_recipes import GRPO, LORA, PREFERENCES, base, group, metrics, policy, rollouts, run

from rlpost.policy.score import logprobs
from rlpost.stages.online_dpo import best_and_worst
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.types import Completion, Group

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
ONLINE = {**GRPO, "kind": "online_dpo", "prompts_per_step": 8, "learning_rate": 1e-2, "schedule": "constant"}
NAN = float("nan")


def numbered(answers: int, prompt: int = 1) -> Group:
    return Group((prompt,), tuple(Completion((i,), (True,)) for i in range(answers)))


def chosen(rewards: list[list[float]], min_gap: float = 0.0) -> list[tuple[int, int, int]]:
    """(group, best, worst) of every pair."""
    groups = [numbered(len(row), p) for p, row in enumerate(rewards)]
    pairs = best_and_worst(groups, torch.tensor(rewards, dtype=torch.float64), min_gap)
    return [(g.prompt[0], *(c.ids[0] for c in g.completions)) for g in pairs]


def test_the_best_and_the_worst_of_each_group_are_a_pair():
    assert chosen([[1.0, 3.0, 0.0, 2.0], [5.0, 5.0, 4.0, 4.0]]) == [(0, 1, 2), (1, 0, 2)]


def test_groups_without_two_different_rewards_give_none():
    assert chosen([[1.0, 1.0, 1.0], [NAN, NAN, NAN], [NAN, 2.0, NAN], [NAN, 2.0, 1.0]]) == [(3, 1, 2)]


def test_a_gap_must_be_more_than_the_smallest():
    rewards = [[1.0, 3.0], [0.5, 3.0]]
    assert chosen(rewards, 2.0) == [(1, 1, 0)]
    assert chosen(rewards, 2.5) == []


def test_equal_completions_are_no_pair_whatever_their_rewards():
    same = Group((1,), (Completion((5, 6), (True, True)),) * 2)
    assert best_and_worst([same], torch.tensor([[1.0, 0.0]]), 0.0) == []


def keep_updates(monkeypatch) -> list[Experience]:
    """What every update learns from."""
    kept: list[Experience] = []
    update = Learner.update

    def record(self, loss, experience, stats=None):
        kept.append(experience)
        return update(self, loss, experience, stats)

    monkeypatch.setattr(Learner, "update", record)
    return kept


@LORA_OR_NOT
def test_it_starts_at_log_2_and_learns_what_is_rewarded(tmp_path, lora, monkeypatch):
    references = keep_references(monkeypatch)
    run(tmp_path, {"online": {**ONLINE, "steps": 15}}, *lora)
    first, *_, last = metrics(tmp_path, "online")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["reward"] > first["reward"] + 1
    assert last["chosen_logratio"] > 2
    assert_only_the_policy_moved(tmp_path, "online", bool(lora))
    start = policy(base(tmp_path))
    pairs = [group(start, r["prompt"], r["chosen"], r["rejected"]) for r in PREFERENCES]
    assert torch.allclose(references[0].logprobs(pairs), logprobs(start, pairs), atol=1e-6)
    names = {"loss", "preference_loss", "accuracy", "margin", "reward", "pairs", "chosen_nll", "truncated", "length"}
    assert names < set(first)


def test_pairs_are_made_of_the_policys_fresh_samples(tmp_path, monkeypatch):
    updates = keep_updates(monkeypatch)
    run(tmp_path, {"online": {**ONLINE, "steps": 2}})
    start = policy(base(tmp_path))
    for step, (update, line) in enumerate(zip(updates, metrics(tmp_path, "online"), strict=True), start=1):
        expected = []
        for row in rollouts(tmp_path, "online", step):
            reward = [c["reward"] for c in row["completions"]]
            assert reward == [c["text"].count("1") for c in row["completions"]]
            best, worst = reward.index(max(reward)), reward.index(min(reward))
            if reward[best] > reward[worst]:
                expected.append([row["completions"][i] for i in (best, worst)])
        assert line["pairs"] == len(expected) == len(update.groups) > 0
        assert [[list(c.ids) for c in g.completions] for g in update.groups] == [
            [c["ids"] for c in pair] for pair in expected
        ]
        # What the sampler said is what the start says in the first step, and no longer in the second; the reference
        # stays.
        sampled = torch.tensor([x for pair in expected for c in pair for x in c["logprobs"]])
        before = logprobs(start, update.groups)
        assert torch.allclose(update["reference"], before, atol=1e-4)
        assert torch.allclose(sampled, before, atol=1e-4) == (step == 1)


def test_log_probabilities_are_taken_at_the_sampling_temperature(tmp_path, monkeypatch):
    updates = keep_updates(monkeypatch)
    hot = {**ONLINE, "steps": 1, "sampling": {"max_new_tokens": 5, "temperature": 2.0}}
    run(tmp_path, {"online": hot})
    (line,) = metrics(tmp_path, "online")
    assert line["margin"] == pytest.approx(0, abs=1e-5)
    (update,) = updates
    start = policy(base(tmp_path))
    assert torch.allclose(update["reference"], logprobs(start, update.groups, temperature=2.0), atol=1e-5)
    assert not torch.allclose(update["reference"], logprobs(start, update.groups), atol=0.1)


def test_a_step_may_take_several_updates_and_passes(tmp_path, monkeypatch):
    updates = keep_updates(monkeypatch)
    run(tmp_path, {"online": {**ONLINE, "steps": 1, "num_minibatches": 2, "num_iterations": 2}})
    (line,) = metrics(tmp_path, "online")
    sizes = [len(u.groups) for u in updates]
    assert len(sizes) == 4
    assert sizes[0] + sizes[1] == sizes[2] + sizes[3] == line["pairs"]
    prompts = [sorted(tuple(g.prompt) for u in pair for g in u.groups) for pair in (updates[:2], updates[2:])]
    assert prompts[0] == prompts[1]


def test_a_step_without_a_pair_moves_nothing(tmp_path):
    equal = {**ONLINE, "steps": 1, "rewards": [{"fn": "rewards.py:always"}]}
    final = run(tmp_path, {"online": equal})
    (line,) = metrics(tmp_path, "online")
    assert (line["pairs"], line["loss"], line["grad_norm"]) == (0, 0.0, 0.0)
    before, after = (policy(folder).causal_lm.state_dict() for folder in (base(tmp_path), final))
    assert all(torch.equal(after[name], w) for name, w in before.items())


@pytest.mark.parametrize("loss", ["ipo", "bco", "simpo"])
def test_other_losses_learn_from_samples_too(tmp_path, loss):
    run(tmp_path, {"online": {**ONLINE, "steps": 6, "loss": {"fn": loss}}})
    first, *_, last = metrics(tmp_path, "online")
    assert last["reward"] > first["reward"]
    assert last["margin"] > 0.5


@LORA_OR_NOT
def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, lora, monkeypatch):
    stages = {"online": {**ONLINE, "steps": 4, "checkpoint_every": 2}}
    run(tmp_path, stages, *lora, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages, *lora)
    run(tmp_path, stages, *lora)
    assert_same_result(tmp_path, "online", lora=bool(lora))
