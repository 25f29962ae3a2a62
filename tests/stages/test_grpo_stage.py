"""Reinforcement learning from samples and rewards."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_recipes import GRPO, LORA, SFT, base, metrics, policy, rollouts, run, weights

from rlpost.errors import RewardError
from rlpost.objectives.surrogates import policy_gradient
from rlpost.policy.logprobs import PolicyOutput
from rlpost.policy.score import logprobs
from rlpost.stages.entropy import EntropyBonus
from rlpost.stages.grpo import surrogate_loss
from rlpost.stages.on_policy import KlPenalty, weighted
from rlpost.stages.params import Kl
from rlpost.train.experience import Experience
from rlpost.types import Completion, Group

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
FLAT_REWARD = {**GRPO, "rewards": [{"fn": "rewards.py:always"}]}
"""No signal: whatever moves the policy is not the reward."""


def same(one, other) -> bool:
    return all(torch.equal(w, other[name]) for name, w in one.items())


@LORA_OR_NOT
def test_the_reward_rises(tmp_path, lora):
    final = run(tmp_path, {"grpo": {**GRPO, "steps": 20, "prompts_per_step": 8, "learning_rate": 2e-2}}, *lora)
    rewards = [line["reward"] for line in metrics(tmp_path, "grpo")]
    assert sum(rewards[:3]) / 3 < 1
    assert sum(rewards[-3:]) / 3 > 3
    if lora:
        assert not list(final.glob("model*.safetensors"))
        assert all("lora_" in name for name in weights(final))


def test_the_time_of_a_step_is_told_by_what_it_went_to(tmp_path):
    run(tmp_path, {"grpo": {**GRPO, "steps": 1}})
    (line,) = map(json.loads, (tmp_path / "runs/run/grpo/timings.jsonl").read_text("utf-8").splitlines())
    parts = [line[name] for name in ("sampling", "scoring", "learning")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(line["seconds"])
    (logged,) = metrics(tmp_path, "grpo")
    assert line["samples_per_second"] * line["seconds"] == pytest.approx(GRPO["prompts_per_step"] * GRPO["group_size"])
    assert line["tokens_per_second"] == pytest.approx(logged["length"] * line["samples_per_second"])
    assert line["peak_memory"] > 2**20
    assert not {*line, "tok/s", "GiB"} - {"step"} & set(logged)


def test_a_stage_that_learns_nothing_is_told_once_what_to_try(tmp_path, capsys):
    run(tmp_path, {"grpo": {**FLAT_REWARD, "steps": 12}})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "troubleshooting.md#zero-signal" in line]
    assert "grpo: step 10: 100% of groups have equal rewards" in line


def advantages(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    return [(r - mean) / (std + 1e-4) if std else 0.0 for r in rewards]


def test_the_first_loss_is_what_the_rollouts_say_by_hand(tmp_path):
    """On-policy every ratio is 1, so the loss is minus the weighted mean of the advantages."""
    run(tmp_path, {"sft": SFT, "grpo": {**GRPO, "steps": 1, "prompts_per_step": 6, "max_tokens_per_microbatch": 20}})
    (line,) = metrics(tmp_path, "grpo")
    groups = [row["completions"] for row in rollouts(tmp_path, "grpo", 1)]
    credit = [advantages([c["reward"] for c in group]) for group in groups]
    every = [(c, a) for group, scores in zip(groups, credit, strict=True) for c, a in zip(group, scores, strict=True)]
    tokens = sum(len(c["ids"]) for c, _ in every)
    assert line["loss"] == pytest.approx(-sum(a * len(c["ids"]) for c, a in every) / tokens, rel=1e-4)
    assert abs(line["loss"]) > 0.01
    assert line["reward"] == pytest.approx(sum(c["reward"] for c, _ in every) / 24)
    assert line["reward/digits"] == line["reward"]
    assert line["length"] == tokens / 24
    assert line["truncated"] == sum(c["finish"] == "length" for c, _ in every) / 24
    assert line["zero_signal"] == sum(len({c["reward"] for c in group}) == 1 for group in groups) / 6
    assert line["entropy"] == pytest.approx(-sum(sum(c["logprobs"]) for c, _ in every) / tokens)
    assert line["ratio"] == pytest.approx(1, abs=1e-5)
    assert line["clipped_low"] == line["clipped_high"] == 0
    assert line["sampler_gap"] < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_are_scored_at_the_temperature_they_were_drawn_at(tmp_path, temperature):
    run(tmp_path, {"grpo": {**GRPO, "steps": 1}}, f"stages.grpo.sampling.temperature={temperature}")
    assert metrics(tmp_path, "grpo")[0]["sampler_gap"] < 1e-5
    model = policy(base(tmp_path))
    for row in rollouts(tmp_path, "grpo", 1):
        sampled = [Completion(tuple(c["ids"]), (True,) * len(c["ids"])) for c in row["completions"]]
        logp = logprobs(model, [Group(tuple(row["prompt"]), tuple(sampled))], temperature=temperature)
        assert logp.tolist() == pytest.approx([x for c in row["completions"] for x in c["logprobs"]], abs=1e-5)
        assert [c["text"].count("1") for c in row["completions"]] == [c["reward"] for c in row["completions"]]


def test_what_is_logged(tmp_path):
    run(tmp_path, {"sft": SFT, "grpo": {**GRPO, "kl": {"beta": 0.1}, "reference": "base", "entropy_coef": 0.01}})
    names = {
        *("step", "reward", "reward/digits", "unscored", "zero_signal", "truncated", "length", "entropy"),
        *("sequence_kl", "beta", "loss", "ratio", "sampler_gap", "clipped_low", "clipped_high", "kl"),
        *("exact_entropy", "grad_norm", "learning_rate"),
    }
    assert [set(line) for line in metrics(tmp_path, "grpo")] == 4 * [names]


def test_rewards_that_are_all_equal_change_nothing(tmp_path):
    final = run(tmp_path, {"grpo": {**FLAT_REWARD, "advantage": {"fn": "group_normalised"}}})
    lines = metrics(tmp_path, "grpo")
    assert [(line["zero_signal"], line["grad_norm"], line["loss"]) for line in lines] == 4 * [(1.0, 0.0, 0.0)]
    assert same(weights(final), weights(base(tmp_path)))


def test_without_momentum_a_step_of_equal_rewards_is_a_pause(tmp_path):
    """Of two rewards the first gives signal at times: the norms tell when."""
    run(tmp_path, {"grpo": {**GRPO, "prompts_per_step": 1, "group_size": 2, "steps": 12}})
    for line in metrics(tmp_path, "grpo"):
        assert (line["zero_signal"] == 1.0) == (line["grad_norm"] == 0.0)


def test_completions_without_a_reward_are_left_out(tmp_path):
    stage = {**GRPO, "rewards": [{"fn": "rewards.py:some_unscored"}], "steps": 1, "prompts_per_step": 8}
    stage["advantage"] = {"fn": "leave_one_out"}
    run(tmp_path, {"sft": SFT, "grpo": stage})
    (line,) = metrics(tmp_path, "grpo")
    groups = [row["completions"] for row in rollouts(tmp_path, "grpo", 1)]
    scored = [[c for c in group if c["reward"] is not None] for group in groups]
    assert line["unscored"] == sum(len(g) - len(s) for g, s in zip(groups, scored, strict=True)) > 0
    assert line["reward"] == pytest.approx(sum(c["reward"] for s in scored for c in s) / sum(len(s) for s in scored))
    total, tokens = 0.0, 0
    for s in scored:
        for c in s:
            others = [o["reward"] for o in s if o is not c]
            advantage = c["reward"] - sum(others) / len(others) if others else 0.0
            total -= advantage * len(c["ids"])
            tokens += len(c["ids"])
    assert line["loss"] == pytest.approx(total / tokens, rel=1e-4)
    # What is left out has no actions in the rollouts' scores, but its tokens and text are kept.
    assert all(c["ids"] for g in groups for c in g)


def test_no_reward_at_all_changes_nothing(tmp_path):
    final = run(tmp_path, {"grpo": {**GRPO, "rewards": [{"fn": "rewards.py:none"}]}})
    lines = metrics(tmp_path, "grpo")
    assert [(line["unscored"], line["grad_norm"]) for line in lines] == 4 * [(16, 0.0)]
    assert not any("reward" in line for line in lines)
    assert same(weights(final), weights(base(tmp_path)))


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_answers_can_be_left_out(tmp_path, masked):
    """The reward tells only what was cut off from what was not: without the cut ones nothing is left to learn."""
    stage = {**GRPO, "rewards": [{"fn": "rewards.py:cut_off"}], "mask_truncated": masked, "prompts_per_step": 8}
    final = run(tmp_path, {"grpo": stage}, "stages.grpo.sampling.max_new_tokens=4")
    lines = metrics(tmp_path, "grpo")
    assert all(0 < line["truncated"] < 1 for line in lines)
    assert all((line["zero_signal"] == 1.0) is masked for line in lines)
    assert same(weights(final), weights(base(tmp_path))) is masked
    assert lines[0]["reward"] == lines[0]["truncated"]  # logged whole, masked or not


@pytest.mark.parametrize(
    ("placement", "estimator", "lora"),
    [
        pytest.param("reward", "k1", (), id="reward-full"),
        pytest.param("loss", "k3", (LORA,), id="k3-lora"),
        *(
            pytest.param(placement, estimator, lora, id=f"{estimator}-{way}", marks=pytest.mark.slow)
            for placement, estimator in [("reward", "k1"), ("loss", "k2"), ("loss", "k3")]
            for way, lora in [("full", ()), ("lora", (LORA,))]
            if (estimator, way) not in {("k1", "full"), ("k3", "lora")}
        ),
    ],
)
def test_the_kl_draws_the_policy_back_to_its_reference(tmp_path, placement, estimator, lora):
    stage = {
        **FLAT_REWARD,
        "steps": 16,
        "prompts_per_step": 16,
        "learning_rate": 1e-2,
        "reference": "base",
        "table_every": 0,
    }
    stage["kl"] = {"beta": 1.0, "placement": placement, "estimator": estimator}
    run(tmp_path, {"sft": SFT, "grpo": stage}, *lora)
    kl = [line["kl"] for line in metrics(tmp_path, "grpo")]
    assert min(kl) >= 0
    assert sum(kl[-3:]) < 0.5 * sum(kl[:3])


@LORA_OR_NOT
def test_the_kl_is_to_where_the_stage_starts_by_default(tmp_path, lora):
    run(tmp_path, {"sft": SFT, "grpo": {**GRPO, "kl": {"beta": 0.1}}}, *lora)
    kl = [line["kl"] for line in metrics(tmp_path, "grpo")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-3


def test_the_entropy_bonus_flattens_the_policy(tmp_path):
    stage = {
        **FLAT_REWARD,
        "steps": 12,
        "prompts_per_step": 16,
        "learning_rate": 1e-2,
        "entropy_coef": 0.1,
        "table_every": 0,
    }
    stage["weight"] = "sequence_sum"  # of the surrogate; the entropy is a mean over actions whatever it is
    run(tmp_path, {"sft": {**SFT, "steps": 12}, "grpo": stage})
    lines = metrics(tmp_path, "grpo")
    assert lines[-1]["exact_entropy"] > lines[0]["exact_entropy"] + 0.3
    for line in lines:
        assert line["entropy"] == pytest.approx(line["exact_entropy"], abs=0.5)  # an estimate from 16 * 4 samples
        # Equal rewards: all that the loss holds is the bonus.
        assert line["loss"] == pytest.approx(-0.1 * line["exact_entropy"], rel=1e-4)


def test_several_updates_a_step_go_on_from_one_another(tmp_path):
    run(tmp_path, {"grpo": {**GRPO, "num_minibatches": 2, "prompts_per_step": 6, "steps": 3, "learning_rate": 1e-2}})
    lines = metrics(tmp_path, "grpo")
    # Six updates in all, on a line down to 0; a step logs the mean of its two: numbers 0 and 1, 2 and 3, 4 and 5.
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * (6 - n) / 6 for n in (0.5, 2.5, 4.5)])
    assert all(abs(line["ratio"] - 1) > 1e-5 for line in lines)  # the first update has moved the policy
    assert all(line["sampler_gap"] < 1e-5 for line in lines)  # but the gap is that of the first, before it moved


def test_every_objective_runs(tmp_path):
    settings = itertools.chain(
        [("loss", f"{{fn: {fn}}}") for fn in ("policy_gradient", "clipped_weight", "sequence_clipped")],
        [("advantage", f"{{fn: {fn}}}") for fn in ("leave_one_out", "group_mean")],
        [("weight", name) for name in ("sequence_mean", "sequence_sum", "constant_length")],
    )
    for number, (key, value) in enumerate(settings):
        run(tmp_path, {"grpo": {**GRPO, "steps": 1}}, f"run=r{number}", f"stages.grpo.{key}={value}")
        (line,) = metrics(tmp_path, "grpo", f"r{number}")
        assert line["grad_norm"] > 0, (key, value)


def test_a_reward_that_fails_stops_the_run_by_its_name(tmp_path):
    stage = {**GRPO, "rewards": [{"fn": "rewards.py:always", "args": {"value": float("inf")}}]}
    with pytest.raises(RewardError, match="always"):
        run(tmp_path, {"grpo": stage})


def test_tables_and_rollouts_come_as_often_as_asked(tmp_path, capsys):
    run(tmp_path, {"grpo": {**GRPO, "steps": 5, "table_every": 2}})
    saved = sorted(f.name for f in (tmp_path / "runs/run/grpo/rollouts").iterdir())
    assert len(saved) in (2, 3)
    assert capsys.readouterr().err.count("samples at step") == len(saved)


def test_weights_are_counted_over_the_whole_update():
    groups = (Group((1,), (Completion((5, 6), (True, True)), Completion((7,), (True,)))),)
    sampling = SimpleNamespace(max_new_tokens=10)
    expected = {
        "token_mean": [1 / 3] * 3,
        "sequence_mean": [1 / 4, 1 / 4, 1 / 2],
        "sequence_sum": [1 / 2] * 3,
        "constant_length": [1 / 20] * 3,
    }
    for name, weight_N in expected.items():
        cfg = SimpleNamespace(weight=name, sampling=sampling)
        update = weighted(Experience(groups), cfg)
        assert update["weight"].tolist() == pytest.approx(weight_N)
        assert update["token_weight"].tolist() == pytest.approx([1 / 3] * 3)


def test_the_kl_that_is_logged_is_the_policys_from_the_reference():
    """k3 of the policy's samples: exp(ref − logp) − 1 − (ref − logp)."""
    loss = SimpleNamespace(fn="policy_gradient", args={})
    cfg = SimpleNamespace(loss=loss, old_kl=None, entropy_coef=0.0, adaptive_entropy=None)
    penalty = KlPenalty(Kl(beta=0.1), object())
    part = Experience((Group((1,), (Completion((5,), (True,)),)),)).with_actions(
        **{name: torch.tensor([-1.0]) for name in ("old_logp", "sampled_logp", "advantage", "weight")},
        reference=torch.tensor([-2.0]),
    )
    _, line = surrogate_loss(policy_gradient, cfg, penalty, EntropyBonus(cfg))(PolicyOutput(torch.tensor([-1.0])), part)
    assert float(line["kl"]) == pytest.approx(math.exp(-1) - 1 + 1)
