"""What is sampled, how it is scored and what is done where sampler and trainer differ: the options of `grpo`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from moved import assert_same_result, fail_after
from tiny_recipes import GRPO, MODEL, PREFERENCES, SFT, base, jsonl, metrics, policy, prepared, rollouts, run, weights

from rlpost.data.step_split import split_steps
from rlpost.data.visible import visible
from rlpost.errors import DataError, RecipeError
from rlpost.policy.judge import RewardModelJudge
from rlpost.policy.params import Model
from rlpost.policy.score import logprobs
from rlpost.policy.value_head import load_value_head_model
from rlpost.types import Completion, Group, completions

STAGE: dict[str, Any] = {**GRPO, "steps": 1, "advantage": {"fn": "leave_one_out"}, "loss": {"fn": "policy_gradient"}}
Rows = list[dict[str, Any]]


def rewards(rows: Rows) -> list[list[float]]:
    return [[c["reward"] for c in row["completions"]] for row in rows]


def every(rows: Rows) -> list[dict[str, Any]]:
    return [c for row in rows for c in row["completions"]]


def leave_one_out(rows: Rows) -> list[float]:
    """[S]."""
    return [r - (sum(group) - r) / (len(group) - 1) for group in rewards(rows) for r in group]


def loss_by_hand(rows: Rows) -> float:
    """−1/N·Σ A·logp, with what the sampler said."""
    terms = [-a * sum(c["logprobs"]) for a, c in zip(leave_one_out(rows), every(rows), strict=True)]
    return sum(terms) / sum(len(c["logprobs"]) for c in every(rows))


def as_groups(rows: Rows) -> list[Group]:
    """The groups that the rollouts were saved from."""

    def completion(c: dict[str, Any]) -> Completion:
        return Completion(tuple(c["ids"]), tuple(map(bool, c["action"])), c["text"], c["finish"], tuple(c["logprobs"]))

    return [Group(tuple(row["prompt"]), tuple(map(completion, row["completions"])), row["example"]) for row in rows]


def line_of(folder: Path, **stage: Any) -> dict[str, Any]:
    """The log of a stage of one step."""
    run(folder, {"grpo": {**STAGE, **stage}})
    (line,) = metrics(folder, "grpo")
    return line


def test_groups_without_a_signal_are_replaced(tmp_path):
    """DAPO's dynamic sampling: those with a signal, in the order drawn, from as many rounds as it takes."""
    few = {"prompts_per_step": 4, "group_size": 3, "sampling": {"max_new_tokens": 3}, "learning_rate": 1e-9}
    run(tmp_path, {"grpo": {**STAGE, **few, "steps": 4}})
    plain = [rollouts(tmp_path, "grpo", step) for step in (1, 2, 3, 4)]
    run(tmp_path, {"grpo": {**STAGE, **few, "dynamic_sampling_rounds": 3}}, "run=again")
    (line,) = metrics(tmp_path, "grpo", "again")
    file = tmp_path / "runs/again/grpo/rollouts/step-000001.jsonl"
    kept = [json.loads(text) for text in file.read_text("utf-8").splitlines()]
    with_signal = [row for row in plain[0] if len(set(rewards([row])[0])) > 1]
    assert 0 < len(with_signal) < 4
    assert kept[: len(with_signal)] == with_signal
    # The rest are the prompts that would have been drawn next, sampled now.
    later = [row["prompt"] for rows in plain[1 : line["drawn"] // 4] for row in rows]
    where = [later.index(row["prompt"]) for row in kept[len(with_signal) :]]
    assert where == sorted(where)
    assert where[-1] >= len(later) - 4
    assert all(len(set(group)) > 1 for group in rewards(kept))
    assert line["zero_signal"] == 0
    assert line["drawn/digits"] < line["reward"] == sum(c["reward"] for c in every(kept)) / 12


def test_prompts_are_drawn_again_so_often_and_no_more(tmp_path):
    line = line_of(tmp_path, dynamic_sampling_rounds=2, rewards=[{"fn": "rewards.py:always"}])
    assert (line["drawn"], line["zero_signal"], line["grad_norm"]) == (12, 1.0, 0.0)
    assert len(rollouts(tmp_path, "grpo", 1)) == 4


def test_nothing_is_drawn_again_where_every_group_has_a_signal(tmp_path):
    telling = [{"fn": "repetition", "args": {"n": 1}}, {"fn": "length", "args": {"target": 1}}, *GRPO["rewards"]]
    line = line_of(tmp_path, dynamic_sampling_rounds=2, rewards=telling, group_size=8)
    assert line["zero_signal"] == 0
    assert not any(name.startswith("drawn") for name in line)


@pytest.mark.parametrize("masked", [False, True])
def test_running_long_costs_and_may_be_left_out(tmp_path, masked):
    """The soft overlong punishment, on top of which what was cut off need not count at all."""
    penalty = {"fn": "length", "args": {"target": 3, "width": 2}}
    line = line_of(tmp_path, rewards=[*GRPO["rewards"], penalty], mask_truncated=masked, prompts_per_step=16)
    rows = rollouts(tmp_path, "grpo", 1)
    for c in every(rows):
        assert c["reward"] == pytest.approx(c["text"].count("1") - max(0, len(c["ids"]) - 3) / 2)
    assert line["reward/length"] == pytest.approx(-sum(max(0, len(c["ids"]) - 3) / 2 for c in every(rows)) / 64)
    total, tokens = 0.0, 0
    for row in rows:
        counted = [c for c in row["completions"] if not (masked and c["finish"] == "length")]
        for c in counted:
            others = [o["reward"] for o in counted if o is not c]
            advantage = c["reward"] - sum(others) / len(others) if others else 0.0
            total -= advantage * sum(c["logprobs"])
            tokens += len(c["ids"])
    assert (tokens < sum(len(c["ids"]) for c in every(rows))) is masked
    assert line["loss"] == pytest.approx(total / tokens, rel=1e-3)
    assert abs(line["loss"]) > 0.005


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A folder with a run of another policy, far from the base, that saved two steps of rollouts."""
    folder = tmp_path_factory.mktemp("other")
    run(folder, {"sft": SFT, "grpo": {**GRPO, "steps": 2}})
    jsonl(folder / "rollouts.jsonl", recorded(folder))
    return folder


def recorded(folder: Path) -> Rows:
    return rollouts(folder, "grpo", 1) + rollouts(folder, "grpo", 2)


def off_policy(folder: Path, name: str, **stage: Any) -> dict[str, Any]:
    """The log of a run that learns from all recorded rollouts at once."""
    data = {"recorded": {"path": "rollouts.jsonl"}}
    settings = {
        **STAGE,
        "recorded": True,
        "data": data,
        "rewards": [],
        "prompts_per_step": 8,
        "table_every": 0,
        **stage,
    }
    run(folder, {"grpo": settings}, f"run={name}")
    (line,) = metrics(folder, "grpo", name)
    return line


def scored(folder: Path) -> list[tuple[float, list[float], list[float]]]:
    """Of every recorded completion: advantage, log-probabilities of the base, log-probabilities when sampled."""
    rows = recorded(folder)
    logp = iter(logprobs(policy(base(folder)), as_groups(rows)).tolist())
    every_c = zip(leave_one_out(rows), every(rows), strict=True)
    return [(a, [next(logp) for _ in c["logprobs"]], c["logprobs"]) for a, c in every_c]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("path", ["runs/run/grpo/rollouts", "rollouts.jsonl"], ids=["folder", "file"])
def test_it_learns_from_what_another_policy_recorded(other, path):
    line = off_policy(
        other,
        f"read_{Path(path).name}",
        data={"recorded": {"path": path}},
        loss={"fn": "policy_gradient", "args": {"truncate": 2.0}},
    )
    known = scored(other)
    tokens = sum(len(x) for _, x, _ in known)
    loss = sum(-a * min(math.exp(x - b), 2.0) * x for a, now, then in known for x, b in zip(now, then, strict=True))
    assert line["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert abs(line["loss"]) > 0.01
    assert line["reward"] == pytest.approx(mean([c["reward"] for c in every(recorded(other))]))
    # Of what was computed: without an advantage there is nothing to learn.
    both = [(x, b) for a, now, then in known if a for x, b in zip(now, then, strict=True)]
    assert line["sampler_gap"] == pytest.approx(mean([abs(x - b) for x, b in both]), rel=1e-4)
    assert line["ratio"] == pytest.approx(mean([math.exp(x - b) for x, b in both]), rel=1e-4)
    assert line["sampler_gap"] > 0.5


def test_recorded_rollouts_can_be_rewarded_anew(other):
    line = off_policy(other, "anew", rewards=[{"fn": "rewards.py:digits", "args": {"digit": "2"}}])
    assert line["reward"] == mean([float(c["text"].count("2")) for c in every(recorded(other))])
    assert line["reward"] != mean([c["reward"] for c in every(recorded(other))])


@pytest.mark.parametrize("per", ["token", "completion"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_correction_weighs_what_sampler_and_trainer_say(other, mode, per):
    cap, floor = 1.5, 0.05
    how = {"mode": mode, "per": per, "cap": cap, "floor": floor if mode == "mask" else 0.0}
    line = off_policy(other, f"{mode}_{per}", correction=how, loss={"fn": "clipped_surrogate"})
    credits, factors = [], []
    for a, now, then in scored(other):
        differences = [x - b for x, b in zip(now, then, strict=True)]
        if per == "completion":
            differences = [sum(differences)] * len(differences)
        for w in map(math.exp, differences):
            credits.append(a)
            factors.append(min(w, cap) if mode == "truncate" else w if floor <= w <= cap else 0.0)
    # The trainer's own words are the old ones: the ratio of the surrogate is 1.
    assert line["loss"] == pytest.approx(-mean([a * w for a, w in zip(credits, factors, strict=True)]), rel=1e-3)
    assert abs(line["loss"]) > 0.003
    assert line["ratio"] == pytest.approx(1, abs=1e-5)
    known = [w for a, w in zip(credits, factors, strict=True) if a]
    share = sum(known) ** 2 / (len(known) * sum(w * w for w in known))
    assert line["effective_samples"] == pytest.approx(share, rel=1e-4)
    assert share < 0.95


def test_a_policy_s_own_samples_need_no_correction(tmp_path):
    line = line_of(tmp_path, correction={"mode": "mask", "cap": 1.001, "floor": 0.999})
    assert line["effective_samples"] == pytest.approx(1, abs=1e-6)
    assert line["loss"] == pytest.approx(loss_by_hand(rollouts(tmp_path, "grpo", 1)), rel=1e-4)


def test_several_passes_go_over_the_same_samples(other):
    line = off_policy(other, "passes", num_iterations=3, num_minibatches=2, learning_rate=1e-2)
    # Six updates in all, on a line down to 0: their mean is that of numbers 2 and 3.
    assert line["learning_rate"] == pytest.approx(1e-2 * 3.5 / 6)
    once = off_policy(other, "once", num_minibatches=2, learning_rate=1e-2)
    assert once["learning_rate"] == pytest.approx(1e-2 * 1.5 / 2)
    assert line["reward"] == once["reward"]


def test_groups_of_another_size_than_recorded_are_refused(other):
    with pytest.raises(DataError, match="a recorded group has 4 completions but group_size=3"):
        off_policy(other, "size", group_size=3)


def test_an_adapting_beta_goes_on_after_a_stop(tmp_path, monkeypatch):
    stage = {
        **STAGE,
        "steps": 6,
        "checkpoint_every": 2,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "dynamic_sampling_rounds": 1,
    }
    stages = {"grpo": {**stage, "kl": {"beta": 0.1, "target": 0.05, "horizon": 40}}}
    run(tmp_path, stages, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages)
    run(tmp_path, stages)
    assert_same_result(tmp_path, "grpo", lora=False)
    lines = metrics(tmp_path, "grpo")
    beta = 0.1
    for line in lines:
        assert line["beta"] == pytest.approx(beta)
        beta *= 1 + min(max(line["sequence_kl"] / 0.05 - 1, -0.2), 0.2) * 16 / 40
    assert lines[1]["beta"] < 0.1  # at first the policy is its reference
    assert lines[-1]["beta"] > lines[2]["beta"]
    assert any("drawn" in line for line in lines)


def digit(number: int, name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"fn": "rewards.py:digits", "args": {"digit": str(number)}, "name": name, "weight": weight}


def test_a_tree_of_rewards_is_logged_by_node(tmp_path):
    both = {"fn": "sum", "name": "both", "weight": 0.5, "of": [digit(1, "ones"), digit(2, "twos", 2.0)]}
    tree = [
        {"fn": "gate", "name": "guarded", "of": [{"fn": "pattern", "name": "three", "args": {"regex": "3"}}, both]},
        {"fn": "product", "of": [digit(4, "fours"), digit(5, "fives")]},
        {"fn": "min", "weight": 2.0, "of": [digit(6, "sixes"), digit(7, "sevens")]},
        {"fn": "lexicographic", "args": {"scale": 5}, "weight": -1.0, "of": [digit(8, "eights"), digit(9, "nines")]},
    ]
    line = line_of(tmp_path, rewards=tree, prompts_per_step=16)
    sums: dict[str, float] = {}
    for c in every(rollouts(tmp_path, "grpo", 1)):
        n = [float(c["text"].count(str(d))) for d in range(10)]
        nodes = {"both": n[1] + 2 * n[2], "product": n[4] * n[5], "min": min(n[6], n[7])}
        nodes |= {"guarded": 0.5 * nodes["both"] if n[3] else 0.0, "lexicographic": n[8] + n[9] / 41}
        total = nodes["guarded"] + nodes["product"] + 2 * nodes["min"] - nodes["lexicographic"]
        assert c["reward"] == pytest.approx(total)
        leaves = zip(
            ("ones", "twos", "fours", "fives", "sixes", "sevens", "eights", "nines"), n[1:3] + n[4:], strict=True
        )
        for name, x in {**nodes, **dict(leaves), "three": float(n[3] > 0)}.items():
            sums[name] = sums.get(name, 0.0) + x
    assert {k: v for k, v in line.items() if k.startswith("reward/")} == {
        f"reward/{name}": pytest.approx(x / 64) for name, x in sums.items()
    }
    assert all(sums.values())


JUDGES: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "max_length": 16}


def judge(folder: Path, stage: str) -> RewardModelJudge:
    final = folder / "runs/run" / stage / "final"
    scalar = load_value_head_model(final, Model(), bfloat16=False, device="cpu")
    return RewardModelJudge(scalar, scalar.trunk.tokenizer)


def test_a_trained_reward_model_rewards(tmp_path):
    trained = {"kind": "reward_model", "data": {"pairs": {"path": "pairs.jsonl"}}, **JUDGES}
    rewarded = {**STAGE, "rewards": [{"fn": "reward_model", "model": "judge"}]}
    run(tmp_path, {"judge": trained, "grpo": rewarded})
    rows = rollouts(tmp_path, "grpo", 1)
    scores = judge(tmp_path, "judge").scores(as_groups(rows))
    assert [c["reward"] for c in every(rows)] == pytest.approx(scores, abs=1e-5)
    assert max(scores) - min(scores) > 0.1
    assert metrics(tmp_path, "grpo")[0]["loss"] == pytest.approx(loss_by_hand(rows), rel=1e-3)


def test_a_trained_process_reward_model_rewards_every_step(tmp_path):
    labelled = [
        {"prompt": row["prompt"], "steps": list(row[which]), "labels": [right] * len(row[which])}
        for row in PREFERENCES
        for which, right in (("chosen", 1.0), ("rejected", 0.0))
    ]
    jsonl(tmp_path / "steps.jsonl", labelled)
    trained = {"kind": "process_reward_model", "data": {"rows": {"path": "steps.jsonl"}}, **JUDGES}
    rewarded = {
        **STAGE,
        "rewards": [{"fn": "process_steps", "model": "judge"}],
        "advantage": {"fn": "process", "args": {"how": "last"}},
        "step_end": "",
    }
    run(tmp_path, {"judge": trained, "grpo": rewarded})
    rows = rollouts(tmp_path, "grpo", 1)
    (line,) = metrics(tmp_path, "grpo")
    tokenizer = policy(base(tmp_path)).tokenizer
    groups = [split_steps(group, tokenizer, "", (tokenizer.eos_token_id,)) for group in as_groups(rows)]
    right = judge(tmp_path, "judge").step_scores(groups, "")
    tokens, total = 0, 0.0
    for saved, c, own in zip(every(rows), completions(groups), right, strict=True):
        assert saved["reward"] == pytest.approx(sum(own), abs=1e-5)
        to_go = [sum(own[k:]) for k, actions in enumerate(c.steps) for _ in range(actions)]
        total -= sum(a * x for a, x in zip(to_go, c.logprobs, strict=True))
        tokens += c.actions
    assert line["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert line["reward/process_steps"] == pytest.approx(mean([sum(own) for own in right]), abs=1e-5)


def test_two_turns_with_an_environment(tmp_path):
    """The calculator's words are read, and credited with nothing."""
    model = {**MODEL, "tokenizer": {"kind": "characters", "alphabet": "0123456789+=?;"}}
    stage = {
        **STAGE,
        "prompts_per_step": 8,
        "data": {"problems": {"task": {"fn": "calculator.train"}, "limit": 64}},
        "environment": {"fn": "calculator.reply"},
        "max_turns": 2,
        "sampling": {"max_new_tokens": 16, "stop": ["="]},
        "max_length": 24,
    }
    final = run(tmp_path, {"grpo": stage}, model=model)
    rows = rollouts(tmp_path, "grpo", 1)
    (line,) = metrics(tmp_path, "grpo")
    tokenizer = policy(base(tmp_path)).tokenizer
    answered = 0
    for c in every(rows):
        heard = tokenizer.decode([i for i, acted in zip(c["ids"], c["action"], strict=True) if not acted])
        assert heard in ("", "???;")
        # A reward reads the last turn: what was said after the calculator.
        said = visible(c["ids"], tokenizer, (tokenizer.eos_token_id,)).split("???;")[-1] if heard else c["text"]
        assert said.removesuffix("=") == c["text"].removesuffix("=")
        assert c["reward"] == c["text"].count("1")
        assert len(c["logprobs"]) == sum(c["action"])
        answered += heard != ""
    assert 4 < answered < 32
    assert line["loss"] == pytest.approx(loss_by_hand(rows), rel=1e-4)
    assert line["length"] == sum(len(c["logprobs"]) for c in every(rows)) / 32
    assert line["sampler_gap"] < 1e-5
    before = weights(base(tmp_path))
    assert not any(torch.equal(w, before[n]) for n, w in weights(final).items())


GATE = {"fn": "gate", "of": [{"fn": "ends"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": {"fn": "process"}}, "step_end: missing - process credits steps"),
        (
            {"advantage": {"fn": "monte_carlo_values"}, "step_end": "", "environment": {"fn": "calculator.reply"}},
            "environment: monte_carlo_values goes on from inside a turn",
        ),
        ({"advantage": {"fn": "pass_at_k", "args": {"k": 5}}}, "advantage.args.k: 5 - expected from 1 to group_size=4"),
        ({"advantage": {"fn": "pass_at_k", "args": {"k": 1}}, "group_size": 1}, "pass_at_k compares completions"),
        ({"loss": {"fn": "geometric_mean"}}, "weight: geometric_mean is one value a completion - use sequence_mean"),
        ({"recorded": True, "environment": {"fn": "calculator.reply"}}, "environment: recorded rollouts are over"),
        ({"recorded": True, "dynamic_sampling_rounds": 1}, "dynamic_sampling_rounds: needs new samples"),
        ({"recorded": True, "advantage": {"fn": "greedy_baseline"}}, "advantage.fn=greedy_baseline: needs new samples"),
        ({"recorded": True, "rewards": [GATE]}, "rewards[0].of: a gate has a guard and what counts if it passed"),
        ({"rewards": [{"fn": "min"}]}, "rewards[0].of: missing - min puts other rewards together"),
        ({"rewards": [{"fn": "ends", "of": [{"fn": "pattern"}]}]}, "rewards[0].fn: 'ends' takes no other rewards"),
        ({"rewards": [{**GATE, "args": {"over": 1}, "of": [{"fn": "ends"}] * 2}]}, "gate has no argument 'over'"),
        ({"rewards": [{"fn": "reward_model"}]}, "rewards[0].model: missing - name a reward_model stage"),
        ({"correction": {"mode": "mask", "cap": 0.5, "floor": 0.5}}, "correction.floor: 0.5 is not below cap=0.5"),
        ({"kl": {"target": 0.1}}, "kl.beta: 0 stays 0 whatever the target"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(RecipeError) as caught:
        prepared(tmp_path, {"grpo": {**STAGE, **change}})
    assert f"stages.grpo.{message}" in str(caught.value) or f": {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fn", "alone"), [("leave_one_out", False), ("max_likelihood", False), ("greedy_baseline", True), ("reward", True)]
)
def test_a_group_of_one_is_warned_of_where_there_is_no_other_baseline(tmp_path, fn, alone):
    stage = {**STAGE, "group_size": 1, "advantage": {"fn": fn}}
    warnings = prepared(tmp_path, {"grpo": stage}).warnings
    assert len(warnings) == (0 if alone else 1)
    assert all(f"a group of one has no baseline: {fn} is 0 everywhere" in w for w in warnings)
