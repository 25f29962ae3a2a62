"""Every estimator of the advantage and every surrogate, against losses made by hand from the saved rollouts."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from moved import assert_same_result, fail_after
from tiny_recipes import GRPO, base, greedy, metrics, policy, rollouts, run, weights

from rlpost.data.step_split import split_steps, step_texts
from rlpost.types import Completion, Group

OWN = '''\
"""Rewards and an estimator of a user."""

import json
from pathlib import Path


def value(text):
    """Digits up to 4 count for something, others against it."""
    return sum(0.5 if c < "5" else -0.3 for c in text if c.isdigit())


def worth(completion):
    return value(completion.text)


def worth_of_steps(completion, steps):
    return [value(step) for step in steps]


def noted(completions):
    """Writes down what it is asked."""
    with Path(__file__).with_name("asked.jsonl").open("a") as file:
        file.write(json.dumps([(c.text, c.actions) for c in completions]) + "\\n")
    return [value(c.text) + 0.1 * c.actions for c in completions]


def above(reward_PG, running_mean):
    return reward_PG - running_mean


def cancelling(reward_N, rows):
    """1 for the first action of two, −1 for the second: nothing, summed over such a completion."""
    credit_N = 0.0 * reward_N
    for first, length in zip(rows.start_S.tolist(), rows.lengths_S.tolist()):
        if length == 2:
            credit_N[first], credit_N[first + 1] = 1.0, -1.0
    return credit_N
'''
WORTH = [{"fn": "own.py:worth"}]
STAGE: dict[str, Any] = {
    **GRPO,
    "steps": 1,
    "rewards": WORTH,
    # Every action's credit is weighed by its own log-probability: misplaced credit is another loss.
    "loss": {"fn": "policy_gradient"},
    "weight": "sequence_sum",
}
Rows = list[dict[str, Any]]
Credit = list[list[Any]]


def learn(folder: Path, *overrides: str, **stage: Any) -> None:
    (folder / "own.py").write_text(OWN, "utf-8")
    run(folder, {"grpo": {**STAGE, **stage}}, *overrides)


def learned(folder: Path, **stage: Any) -> Rows:
    """The rollouts of the first step of the stage."""
    learn(folder, **stage)
    return rollouts(folder, "grpo", 1)


def value(text: str) -> float:
    return sum(0.5 if c < "5" else -0.3 for c in text if c.isdigit())


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def std(numbers: list[float]) -> float:
    return (sum((x - mean(numbers)) ** 2 for x in numbers) / (len(numbers) - 1)) ** 0.5


def rewards(rows: Rows) -> list[list[float]]:
    return [[c["reward"] for c in row["completions"]] for row in rows]


def lengths(rows: Rows) -> list[list[int]]:
    return [[len(c["logprobs"]) for c in row["completions"]] for row in rows]


def loss_by_hand(rows: Rows, credit: Credit) -> float:
    """−1/S·Σ A·logp; the credit of a completion is one number, or one an action."""
    terms = []
    for row, group in zip(rows, credit, strict=True):
        for c, own in zip(row["completions"], group, strict=True):
            each = own if isinstance(own, list) else [own] * len(c["logprobs"])
            terms.append(-sum(a * x for a, x in zip(each, c["logprobs"], strict=True)))
    return mean(terms)


def assert_credited(folder: Path, rows: Rows, credit: Credit) -> None:
    line = metrics(folder, "grpo")[0]
    assert line["loss"] == pytest.approx(loss_by_hand(rows, credit), rel=1e-4)
    assert abs(line["loss"]) > 0.01
    assert line["grad_norm"] > 0


def nonzero_rescaled(r: list[list[float]], n: list[list[int]]) -> Credit:
    signal = sum(len(set(group)) > 1 for group in r)
    assert 0 < signal < len(r)
    return [[(x - mean(group)) * len(r) / signal for x in group] for group in r]


def max_likelihood(r: list[list[float]], n: list[list[int]]) -> Credit:
    assert {mean(group) > 0 for group in r} == {True, False}
    return [[(x - mean(group)) / mean(group) if mean(group) > 0 else 0.0 for x in group] for group in r]


def length_weighted(r: list[list[float]], n: list[list[int]]) -> Credit:
    baselines = [sum(x * m for x, m in zip(*both, strict=True)) / sum(both[1]) for both in zip(r, n, strict=True)]
    return [[x - b for x in group] for group, b in zip(r, baselines, strict=True)]


def best_of_two(r: list[list[float]], n: list[list[int]]) -> Credit:
    """The mean best of the pairs with a completion, less that of the pairs without, times two."""

    def credit(group: list[float], i: int) -> float:
        pairs = list(combinations(range(len(group)), 2))
        with_i = [max(group[j] for j in pair) for pair in pairs if i in pair]
        without = [max(group[j] for j in pair) for pair in pairs if i not in pair]
        return 2 * (mean(with_i) - mean(without))

    return [[credit(group, i) for i in range(len(group))] for group in r]


def whole_batch(r: list[list[float]], n: list[list[int]]) -> Credit:
    spread = std([x for group in r for x in group])
    return [[(x - mean(group)) / (spread + 1e-4) for x in group] for group in r]


@pytest.mark.parametrize(
    ("fn", "args", "by_hand"),
    [
        ("nonzero_rescaled", {}, nonzero_rescaled),
        ("max_likelihood", {}, max_likelihood),
        ("length_weighted_baseline", {}, length_weighted),
        ("pass_at_k", {"k": 2}, best_of_two),
        ("group_normalised", {"std_over": "batch"}, whole_batch),
    ],
)
def test_an_estimator_of_rewards_by_hand(tmp_path, fn, args, by_hand):
    # Two completions of few tokens are equal at times: such a group has no signal.
    short = fn == "nonzero_rescaled"
    shape = {"group_size": 2, "prompts_per_step": 8, "sampling": {"max_new_tokens": 1}} if short else {}
    rows = learned(tmp_path, advantage={"fn": fn, "args": args}, **shape)
    assert_credited(tmp_path, rows, by_hand(rewards(rows), lengths(rows)))


@pytest.mark.parametrize("size", [1, 4])
def test_the_greedy_completion_is_the_baseline(tmp_path, size):
    rows = learned(tmp_path, advantage={"fn": "greedy_baseline"}, group_size=size)
    answers = greedy(policy(base(tmp_path)), *(row["example"]["prompt"] for row in rows))
    assert len({value(text) for text in answers}) > 1
    credit = [[r - value(text) for r in group] for group, text in zip(rewards(rows), answers, strict=True)]
    assert_credited(tmp_path, rows, credit)


def test_rewards_are_normalised_one_by_one(tmp_path):
    """Each in its group, then their weighted sum over the batch."""
    two = [*WORTH, {"fn": "rewards.py:digits", "weight": 0.5}]
    rows = learned(tmp_path, advantage={"fn": "per_reward_normalised"}, rewards=two)

    def normalised(x: list[float]) -> list[float]:
        return [(v - mean(x)) / (std(x) + 1e-4) if len(set(x)) > 1 else 0.0 for v in x]

    texts = [[c["text"] for c in row["completions"]] for row in rows]
    first = [normalised([value(t) for t in group]) for group in texts]
    second = [normalised([float(t.count("1")) for t in group]) for group in texts]
    sums = [[x + 0.5 * y for x, y in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
    every = [x for group in sums for x in group]
    assert_credited(tmp_path, rows, [[(x - mean(every)) / (std(every) + 1e-4) for x in group] for group in sums])
    assert rewards(rows) == [[pytest.approx(value(t) + 0.5 * t.count("1")) for t in group] for group in texts]


@pytest.mark.parametrize(
    ("advantage", "decay"),
    [({"fn": "ema_baseline", "args": {"decay": 0.6}}, 0.6), ({"fn": "own.py:above"}, 0.9)],
    ids=["ours", "a user's"],
)
def test_the_running_mean_is_of_the_steps_before(tmp_path, advantage, decay):
    learn(tmp_path, steps=3, advantage=advantage)
    before = None
    for step, line in enumerate(metrics(tmp_path, "grpo"), 1):
        rows = rollouts(tmp_path, "grpo", step)
        credit = [[x - (before or 0.0) for x in group] for group in rewards(rows)]
        assert line["loss"] == pytest.approx(loss_by_hand(rows, credit), rel=1e-4)
        now = mean([x for group in rewards(rows) for x in group])
        before = now if before is None else decay * before + (1 - decay) * now


def test_the_running_mean_goes_on_after_a_stop(tmp_path, monkeypatch):
    more = {"steps": 6, "checkpoint_every": 2, "advantage": {"fn": "ema_baseline"}}
    learn(tmp_path, "run=whole", **more)
    with monkeypatch.context() as patched:
        fail_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path, **more)
    learn(tmp_path, **more)
    assert_same_result(tmp_path, "grpo", lora=False)


def divided(rows: Rows, tokenizer: Any, end: str) -> list[list[Completion]]:
    """The completions with their steps."""
    groups = [
        Group(
            tuple(row["prompt"]),
            tuple(Completion(tuple(c["ids"]), (True,) * len(c["ids"]), c["text"]) for c in row["completions"]),
        )
        for row in rows
    ]
    return [list(split_steps(group, tokenizer, end, (tokenizer.eos_token_id,)).completions) for group in groups]


def placed(how: str, given: list[float], lengths: tuple[int, ...]) -> list[float]:
    """The credit of every action: what comes from it on."""
    worst = min(range(len(given)), key=lambda k: given[k])
    credit = []
    for k, length in enumerate(lengths):
        for i in range(length):
            if how == "least":
                credit.append(given[k] if k == worst else given[worst] if k < worst else 0.0)
            else:
                own = given[k] * (length - i) / length if how == "even" else given[k]
                credit.append(own + sum(given[k + 1 :]))
    return credit


def with_outcome(completion: Completion, tokenizer: Any) -> list[float]:
    """The steps' rewards; what is not given by step comes with the last."""
    given = [value(text) for text in step_texts(completion, tokenizer, (tokenizer.eos_token_id,))]
    given[-1] += 0.5 * completion.text.count("1")
    return given


BY_STEP = {"rewards": [{"fn": "own.py:worth_of_steps"}, {"fn": "rewards.py:digits", "weight": 0.5}]}
ENDS = pytest.mark.parametrize("end", ["", "4"], ids=["tokens", "texts"])
"""Every token is a step, or a text ends one."""


@ENDS
@pytest.mark.parametrize("how", ["even", "last", "least"])
def test_steps_are_credited_with_what_comes_from_them_on(tmp_path, how, end):
    rows = learned(tmp_path, **BY_STEP, step_end=end, advantage={"fn": "process", "args": {"how": how}})
    tokenizer = policy(base(tmp_path)).tokenizer
    groups = divided(rows, tokenizer, end)
    assert any(len(c.steps) > 1 for group in groups for c in group)
    assert any(max(c.steps) > 1 for group in groups for c in group)
    assert_credited(
        tmp_path, rows, [[placed(how, with_outcome(c, tokenizer), c.steps) for c in group] for group in groups]
    )


@ENDS
def test_rewards_of_steps_are_normalised_over_the_steps_of_a_group(tmp_path, end):
    rows = learned(tmp_path, **BY_STEP, step_end=end, advantage={"fn": "process_normalised"})
    tokenizer = policy(base(tmp_path)).tokenizer
    credit = []
    for group in divided(rows, tokenizer, end):
        given = [with_outcome(c, tokenizer) for c in group]
        every = [x for own in given for x in own]
        z = [[(x - mean(every)) / (std(every) + 1e-4) for x in own] for own in given]
        credit.append([placed("last", own, c.steps) for own, c in zip(z, group, strict=True)])
    assert_credited(tmp_path, rows, credit)


def test_a_state_is_worth_what_fresh_rollouts_earn_from_it(tmp_path):
    """VinePPO: an action's credit is the value after its step less the value before it."""
    two = [{"fn": "own.py:noted"}, {"fn": "own.py:worth_of_steps", "weight": 0.5}]
    rows = learned(
        tmp_path, step_end="", fresh_rollouts=3, advantage={"fn": "monte_carlo_values"}, rewards=two, prompts_per_step=3
    )
    sampled, fresh = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text("utf-8").splitlines()]
    assert sampled == [[c["text"], len(c["ids"])] for row in rows for c in row["completions"]]
    # A rollout is rewarded with what was said before it began: its text, its length, its steps.
    # A barely trained model also writes special tokens, which stand in the text by their names.
    assert all(len(re.sub("<(pad|bos|unk)>", "?", text)) <= length <= 5 for text, length in fresh)
    tries = iter([fresh[i : i + 3] for i in range(0, len(fresh), 3)])
    tokenizer = policy(base(tmp_path)).tokenizer
    credit: Credit = []
    for group in divided(rows, tokenizer, ""):
        credit.append([])
        for c in group:
            said = step_texts(c, tokenizer, (tokenizer.eos_token_id,))
            own = [next(tries) for _ in said]
            assert all(text.startswith("".join(said[:k])) for k, three in enumerate(own) for text, _ in three)
            values = [mean([earned(*one) for one in three]) for three in own]
            after = [*values[1:], earned(c.text, len(c.ids))]
            steps = zip(c.steps, after, values, strict=True)
            credit[-1].append([b - a for n, b, a in steps for _ in range(n)])
    assert next(tries, None) is None
    assert_credited(tmp_path, rows, credit)


def earned(text: str, length: int) -> float:
    return 1.5 * value(text) + 0.1 * length


def test_credit_that_cancels_within_a_completion_is_no_reason_to_skip_it(tmp_path):
    rows = learned(tmp_path, advantage={"fn": "own.py:cancelling"}, sampling={"max_new_tokens": 2})
    credit: Credit = [[[1.0, -1.0] if n == 2 else [0.0] * n for n in group] for group in lengths(rows)]
    assert any(n == 2 for group in lengths(rows) for n in group)
    assert_credited(tmp_path, rows, credit)


@pytest.mark.parametrize("per", ["token", "completion"])
def test_a_correction_compares_the_two_at_the_temperature_that_was_sampled_at(tmp_path, per):
    """Engine and trainer are one model here, whose weights are therefore 1 at any temperature."""
    correction = {"mode": "truncate", "per": per, "cap": 100.0}
    rows = learned(tmp_path, sampling={"max_new_tokens": 5, "temperature": 0.5}, correction=correction)
    line = metrics(tmp_path, "grpo")[0]
    assert line["effective_samples"] == pytest.approx(1, abs=1e-4)
    assert line["sampler_gap"] < 1e-3
    centred = [[(x - mean(g)) / (std(g) + 1e-4) if len(set(g)) > 1 else 0.0 for x in g] for g in rewards(rows)]
    assert_credited(tmp_path, rows, centred)


def test_advantages_of_all_actions_can_be_whitened(tmp_path):
    rows = learned(tmp_path, advantage={"fn": "reward"}, whiten=True)
    both = zip(rewards(rows), lengths(rows), strict=True)
    every = [x for r, n in both for reward, count in zip(r, n, strict=True) for x in [reward] * count]
    spread = (mean([(x - mean(every)) ** 2 for x in every]) + 1e-8) ** 0.5
    assert_credited(tmp_path, rows, [[(x - mean(every)) / spread for x in group] for group in rewards(rows)])


VALUES = {
    # −A·logp
    "policy_gradient": lambda a, logp: -a * logp,
    "clipped_weight": lambda a, logp: -a * logp,
    # −A·r, with r = 1
    "clipped_surrogate": lambda a, logp: -a,
    "sequence_clipped": lambda a, logp: -a,
    "geometric_mean": lambda a, logp: -a,
    "divergence_masked": lambda a, logp: -a,
    # −(4/τ)·σ(0)·A, of one τ for either sign
    "soft_adaptive": lambda a, logp: -a * 2 / (0.5 if a > 0 else 2.0),
}
"""The loss of an action, of its advantage and log-probability, by surrogate."""
ARGS = {
    "clipped_surrogate": {"clip_low": 0.2, "clip_high": 0.28, "dual": 3.0, "delta": 2.0},
    "soft_adaptive": {"tau_positive": 0.5, "tau_negative": 2.0},
}


def test_on_policy_surrogates_differ_by_their_value_alone(tmp_path):
    """Where no ratio has moved from 1, all have the gradient of REINFORCE."""
    norms = []
    for fn, by_hand in VALUES.items():
        name = "run" if not norms else fn
        loss = {"fn": fn, "args": ARGS.get(fn, {})}
        learn(tmp_path, f"run={name}", loss=loss, weight="sequence_mean", advantage={"fn": "reward"})
        (line,) = metrics(tmp_path, "grpo", name)
        sampled = [c for row in rollouts(tmp_path, "grpo", 1) for c in row["completions"]]
        expected = mean([mean([by_hand(c["reward"], x) for x in c["logprobs"]]) for c in sampled])
        assert line["loss"] == pytest.approx(expected, rel=1e-4), fn
        assert abs(line["loss"]) > 0.01
        norms.append(line["grad_norm"])
        before, after = weights(base(tmp_path)), weights(tmp_path / "runs" / name / "grpo/final")
        assert not any(torch.equal(w, before[n]) for n, w in after.items()), fn
    assert norms == pytest.approx([norms[0]] * len(VALUES), rel=1e-4)
