"""KTO: completions that are each desirable or not, against a point of reference from mismatched pairs."""

from __future__ import annotations

import math

import pytest
import torch
from moved import assert_only_the_policy_moved, assert_same_result, fail_after, keep_references
from tiny_recipes import LORA, PREFERENCES, SFT, base, group, jsonl, metrics, policy, run

from rlpost.errors import DataError, RecipeError
from rlpost.policy.score import logprobs
from rlpost.stages.kto import mismatched
from rlpost.types import Completion, Group

LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])
ROWS = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in PREFERENCES]
ROWS += [{"prompt": r["prompt"], "completion": r["rejected"], "label": False} for r in PREFERENCES]
KTO = {
    "kind": "kto",
    "data": {"rows": {"path": "labelled.jsonl"}},
    "steps": 4,
    "batch_size": len(ROWS),
    "learning_rate": 1e-3,
    "max_length": 16,
}
"""Every update holds all rows, so that numbers do not depend on their order."""


@pytest.fixture(autouse=True)
def labelled(tmp_path):
    jsonl(tmp_path / "labelled.jsonl", ROWS)


def of(some) -> Group:
    """A group by the numbers of its prompt and of its completion."""
    prompt, completion = some
    return Group((prompt,), (Completion((completion,), (True,)),), {"row": prompt})


def test_every_prompt_gets_the_completion_of_another_row():
    groups = [of((i, i)) for i in range(7)]
    for seed in range(20):
        mixed = mismatched(groups, seed)
        assert [tuple(g.prompt) for g in mixed] == [tuple(g.prompt) for g in groups]
        given = [g.completions[0].ids[0] for g in mixed]
        assert sorted(given) == list(range(7))
        assert all(i != completion for i, completion in enumerate(given))
    once, again, other = ([g.digest() for g in mismatched(groups, seed)] for seed in (3, 3, 4))
    assert once == again != other


@LORA_OR_NOT
def test_it_learns_what_is_desirable_and_moves_nothing_else(tmp_path, lora, monkeypatch):
    references = keep_references(monkeypatch)
    final = run(tmp_path, {"kto": {**KTO, "steps": 25, "learning_rate": 1e-2}}, *lora)
    first, *_, last = metrics(tmp_path, "kto")
    # At the reference every log-ratio and z are 0, and every value is σ(0).
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["z"] == pytest.approx(0, abs=1e-5)
    assert first["desirable_logratio"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.42
    assert last["desirable_logratio"] > last["undesirable_logratio"] + 5
    assert set(first) == {
        *("step", "loss", "desirable_logratio", "undesirable_logratio", "z", "grad_norm", "learning_rate"),
    }
    assert_only_the_policy_moved(tmp_path, "kto", bool(lora))
    start, trained = policy(base(tmp_path)), policy(final)
    groups = [group(start, r["prompt"], r["completion"]) for r in ROWS]
    assert torch.allclose(references[0].logprobs(groups), logprobs(start, groups), atol=1e-6)
    delta = [float((logprobs(trained, [g]) - logprobs(start, [g])).sum()) for g in groups]
    assert sum(delta[:9]) / 9 > sum(delta[9:]) / 9 + 5


def test_the_two_sides_weigh_what_the_recipe_says(tmp_path):
    few = [*ROWS[:3], ROWS[9]]
    jsonl(tmp_path / "labelled.jsonl", few)
    loss = {"fn": "kto", "args": {"desirable": 2.0, "undesirable": 0.5}}
    run(tmp_path, {"kto": {**KTO, "steps": 1, "batch_size": 4, "loss": loss}})
    (line,) = metrics(tmp_path, "kto")
    assert line["loss"] == pytest.approx((3 * 2.0 + 0.5) / 4 / 2, abs=1e-6)  # w·σ(0) each


@pytest.mark.parametrize(("lora", "reference"), [((), "base"), ((LORA,), "sft")], ids=["full", "lora"])
def test_the_loss_away_from_the_reference_by_hand(tmp_path, lora, reference):
    """Of two rows each is the other's mismatch, whatever the seed; sft is away from base, and learned from both."""
    rows = [
        {"prompt": "1+2=", "completion": "31", "label": True},
        {"prompt": "7+2=", "completion": "99", "label": False},
    ]
    jsonl(tmp_path / "labelled.jsonl", rows)
    # Desirable or not, both answers become likelier, also after each other's prompt: z is above 0.
    learned = {**SFT, "data": KTO["data"], "batch_size": 2, "learning_rate": 1e-2}
    loss = {"fn": "kto", "args": {"beta": 0.5}}
    judged = {**KTO, "batch_size": 2, "steps": 1, "loss": loss, "reference": reference}
    run(tmp_path, {"sft": SFT, "learned": learned, "kto": judged}, *lora)
    now = policy(tmp_path / "runs/run/learned/final")
    then = policy(tmp_path / "runs/run/sft/final" if reference == "sft" else base(tmp_path))

    def delta(prompt: int, completion: int) -> float:
        one = [group(now, rows[prompt]["prompt"], rows[completion]["completion"])]
        return float((logprobs(now, one) - logprobs(then, one)).sum())

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    z = max(0.0, (delta(0, 1) + delta(1, 0)) / 2)
    good, bad = delta(0, 0), delta(1, 1)
    assert z > 0.5
    (line,) = metrics(tmp_path, "kto")
    assert line["z"] == pytest.approx(z, abs=1e-4)
    assert line["desirable_logratio"] == pytest.approx(good, abs=1e-4)
    assert line["undesirable_logratio"] == pytest.approx(bad, abs=1e-4)
    expected = (1 - sigmoid(0.5 * (good - z)) + 1 - sigmoid(0.5 * (z - bad))) / 2
    assert line["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs((good + bad) / 2 - z) > 0.5, "pairs as they belong together would say the same"


def test_z_is_the_updates_and_so_the_cut_into_parts_changes_nothing(tmp_path):
    jsonl(tmp_path / "labelled.jsonl", ROWS[:12])
    settings = {**KTO, "batch_size": 12, "steps": 2, "reference": "base"}
    for name, budget in (("whole", 8192), ("cut", 1)):
        run(tmp_path, {"sft": SFT, "kto": {**settings, "max_tokens_per_microbatch": budget}}, f"run={name}")
    whole, cut = (metrics(tmp_path, "kto", name) for name in ("whole", "cut"))
    for one, other in zip(whole, cut, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert max(line["z"] for line in whole) > 0.1, "z was 0 throughout, and nothing was tested"


@LORA_OR_NOT
def test_killed_in_the_middle_it_ends_as_if_it_had_gone_through(tmp_path, lora, monkeypatch):
    stages = {"kto": {**KTO, "batch_size": 5, "steps": 4, "checkpoint_every": 2}}
    run(tmp_path, stages, *lora, "run=whole")
    with monkeypatch.context() as patched:
        fail_after(3, patched)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, stages, *lora)
    run(tmp_path, stages, *lora)
    assert_same_result(tmp_path, "kto", lora=bool(lora))


def test_rows_without_a_label_and_single_rows_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"stages\.kto\.batch_size: expected at least 2"):
        run(tmp_path, {"kto": {**KTO, "batch_size": 1}})
    with pytest.raises(DataError, match=r"needed are \(prompt, completion, label\)"):
        run(tmp_path, {"kto": {**KTO, "data": {"pairs": {"path": "pairs.jsonl"}}}})
