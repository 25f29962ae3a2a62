"""TRPO: every step stays within the trust region, by what it measures and by a count of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moved import assert_only_the_policy_moved, assert_same_result
from tiny_recipes import LORA, SFT, TRPO, base, metrics, policy, rollouts, run, weights
from torch import Tensor

from rlpost.errors import DivergedError, ModelError
from rlpost.policy.attention import use_attention
from rlpost.stages import trpo
from rlpost.train.learner import Learner

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
ONE = {**TRPO, "steps": 1, "prompts_per_step": 8}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(w, other[name]) for name, w in one.items())


@LORA_OR_NOT
def test_every_step_stays_within_the_region_and_the_reward_rises(tmp_path, lora):
    run(tmp_path, {"trpo": {**TRPO, "steps": 8, "prompts_per_step": 8, "max_kl": 0.1, "table_every": 0}}, *lora)
    lines = metrics(tmp_path, "trpo")
    for line in lines:
        assert 0 < line["step_kl"] <= 0.1
        assert line["kl_over_delta"] == line["step_kl"] / 0.1
        assert line["improvement"] > 0
        assert line["step_share"] in [2.0**-i for i in range(11)]
    assert max(line["kl_over_delta"] for line in lines) > 0.5  # it goes as far as it may
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])
    assert_only_the_policy_moved(tmp_path, "trpo", bool(lora))


def plain(folder: Path) -> Callable[[list[int], list[int]], Tensor]:
    """(prompt, completion) -> [n, V] log-probabilities in each of its states, by transformers' own forward."""
    model = policy(folder).causal_lm
    use_attention(model, "eager")

    @torch.no_grad()
    def logprobs(prompt: list[int], ids: list[int]) -> Tensor:
        return model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)

    return logprobs


@LORA_OR_NOT
def test_the_step_measured_by_hand(tmp_path, lora):
    final = run(tmp_path, {"sft": SFT, "trpo": {**ONE, "advantage": {"fn": "leave_one_out"}}}, *lora)
    (line,) = metrics(tmp_path, "trpo")
    before, after = plain(tmp_path / "runs/run/sft/final"), plain(final)
    kl, gain, actions, start = 0.0, 0.0, 0, 0.0
    for row in rollouts(tmp_path, "trpo", 1):
        total = sum(c["reward"] for c in row["completions"])
        for c in row["completions"]:
            advantage = c["reward"] - (total - c["reward"]) / 3
            old, new = (says(row["prompt"], c["ids"]) for says in (before, after))
            kl += float((old.exp() * (old - new)).sum())
            taken = torch.tensor(c["ids"])[:, None]
            ratio = (new - old).exp().gather(1, taken)
            gain += advantage * float((ratio - 1).sum())
            start += advantage * len(c["ids"])
            actions += len(c["ids"])
    assert line["step_kl"] == pytest.approx(kl / actions, rel=1e-3)
    assert line["improvement"] == pytest.approx(gain / actions, rel=1e-3)
    assert line["loss"] == pytest.approx(-start / actions, abs=1e-5)  # every ratio is 1 before the step


@LORA_OR_NOT
def test_rewards_that_are_all_equal_change_nothing(tmp_path, lora):
    stages = {"sft": SFT, "trpo": {**TRPO, "steps": 2, "rewards": [{"fn": "rewards.py:always"}]}}
    final = run(tmp_path, stages, *lora)
    lines = metrics(tmp_path, "trpo")
    assert [(line["zero_signal"], line["grad_norm"], line["step_kl"]) for line in lines] == 2 * [(1.0, 0.0, 0.0)]
    assert same(weights(final), weights(tmp_path / "runs/run/sft/final"))


def test_no_reward_at_all_changes_nothing(tmp_path):
    final = run(tmp_path, {"trpo": {**TRPO, "steps": 1, "rewards": [{"fn": "rewards.py:none"}]}})
    assert [line["grad_norm"] for line in metrics(tmp_path, "trpo")] == [0.0]
    assert same(weights(final), weights(base(tmp_path)))


@LORA_OR_NOT
def test_a_search_without_an_acceptable_step_leaves_the_weights_exactly(tmp_path, lora, monkeypatch):
    length = trpo.step_length
    monkeypatch.setattr(trpo, "step_length", lambda *args: 100 * length(*args))
    stages = {"sft": SFT, "trpo": {**TRPO, "steps": 2, "backtracks": 1}}
    final = run(tmp_path, stages, *lora)
    for line in metrics(tmp_path, "trpo"):
        assert (line["step_share"], line["improvement"], line["step_kl"], line["kl_over_delta"]) == (0, 0, 0, 0)
        assert line["grad_norm"] > 0
    assert same(weights(final), weights(tmp_path / "runs/run/sft/final"))


def test_a_step_that_is_too_long_is_halved_until_it_fits(tmp_path, monkeypatch):
    length = trpo.step_length
    monkeypatch.setattr(trpo, "step_length", lambda *args: 8 * length(*args))
    run(tmp_path, {"trpo": ONE})
    (line,) = metrics(tmp_path, "trpo")
    assert line["step_share"] in (1 / 8, 1 / 16, 1 / 32)
    assert 0 < line["kl_over_delta"] <= 1


def test_the_region_is_a_mean_over_actions_whatever_the_weight(tmp_path):
    """A Fisher matrix of sums over completions would be several times as large, and the step as much too short."""
    run(tmp_path, {"trpo": {**ONE, "max_kl": 1e-3, "cg_iterations": 5, "weight": "sequence_sum"}})
    (line,) = metrics(tmp_path, "trpo")
    assert line["kl_over_delta"] / line["step_share"] ** 2 == pytest.approx(1, abs=0.2)


def test_what_is_solved_is_damped_and_what_is_measured_is_not(tmp_path, monkeypatch):
    """Of a Fisher matrix of zeros the damping is left."""
    asked = []
    monkeypatch.setattr(trpo, "finite_difference", lambda _, v, **_more: torch.zeros_like(v))

    def solve(product, g, *, iterations, dot):
        asked.append((g, product(g)))
        return g

    monkeypatch.setattr(trpo, "conjugate_gradient", solve)
    run(tmp_path, {"trpo": {**ONE, "cg_damping": 0.25}})
    ((g, image),) = asked
    assert torch.allclose(image, 0.25 * g)
    assert metrics(tmp_path, "trpo")[0]["step_share"] == 0


def test_every_update_of_a_step_has_a_region_of_its_own(tmp_path, monkeypatch):
    measured = []
    update = trpo.trust_region_update

    def record(learner: Learner, *args) -> dict[str, float]:
        rate = learner.rate
        measured.append((rate, update(learner, *args)))
        return measured[-1][1]

    monkeypatch.setattr(trpo, "trust_region_update", record)
    stage = {**TRPO, "steps": 2, "num_minibatches": 2, "num_iterations": 2, "schedule": "linear"}
    stage |= {"prompts_per_step": 8, "group_size": 8, "cg_iterations": 1}
    run(tmp_path, {"trpo": stage})
    assert [rate for rate, _ in measured] == pytest.approx([(8 - n) / 8 for n in range(8)])
    assert all(0 < line["step_kl"] <= 0.02 for _, line in measured)
    for step, line in enumerate(metrics(tmp_path, "trpo")):
        own = [found["step_kl"] for _, found in measured[4 * step : 4 * step + 4]]
        assert line["step_kl"] == pytest.approx(sum(own) / 4)


@LORA_OR_NOT
def test_the_step_does_not_depend_on_how_the_update_is_cut(tmp_path, lora):
    found = []
    for budget in (40, 8192):
        final = run(tmp_path, {"trpo": {**ONE, "max_tokens_per_microbatch": budget}}, *lora, f"run=b{budget}")
        found.append(weights(final))
        assert metrics(tmp_path, "trpo", f"b{budget}")[0]["kl_over_delta"] > 0.1
    for name, w in found[0].items():
        assert torch.allclose(w, found[1][name], rtol=0, atol=5e-6), name


@LORA_OR_NOT
def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, lora, monkeypatch):
    """With a running mean, and a coefficient of the KL that adapts: both are taken up again."""
    stage = {**TRPO, "steps": 4, "checkpoint_every": 2, "advantage": {"fn": "ema_baseline"}, "schedule": "linear"}
    stage |= {"kl": {"beta": 0.1, "target": 0.5, "horizon": 50}, "reference": "base"}
    run(tmp_path, {"sft": SFT, "trpo": stage}, *lora, "run=whole")
    update = trpo.trust_region_update

    def failing(learner: Learner, *args) -> dict[str, float]:
        if learner.updates == 3:
            raise KeyboardInterrupt
        return update(learner, *args)

    with monkeypatch.context() as patched:
        patched.setattr(trpo, "trust_region_update", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, {"sft": SFT, "trpo": stage}, *lora)
    assert len(metrics(tmp_path, "trpo")) == 3
    run(tmp_path, {"sft": SFT, "trpo": stage}, *lora)
    assert_same_result(tmp_path, "trpo", lora=bool(lora))
    lines = metrics(tmp_path, "trpo")
    assert len({line["beta"] for line in lines}) == 4
    assert lines[-1]["step_kl"] > 0


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    (tmp_path / "broken.py").write_text("def broken(reward_PG):\n    return reward_PG * float('nan')\n", "utf-8")
    with pytest.raises(DivergedError, match=r"the gradient of .* is not finite; nothing was changed by it"):
        run(tmp_path, {"trpo": {**TRPO, "advantage": {"fn": "broken.py:broken"}}})
    assert not (tmp_path / "runs/run/trpo/final").exists()


def test_distributions_too_many_to_keep_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trpo, "MOST_NUMBERS", 1000)
    with pytest.raises(ModelError, match="use a lower prompts_per_step or a higher num_minibatches, for at most 1e"):
        run(tmp_path, {"trpo": TRPO})
