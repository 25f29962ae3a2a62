"""Labelled rows in supervised fine-tuning: some completions are to be said, others not."""

from __future__ import annotations

import pytest
import torch
from moved import assert_only_the_policy_moved
from tiny_recipes import LORA, SFT, base, group, jsonl, metrics, policy, run
from torch import Tensor

from rlpost.cli.shown import show_rows
from rlpost.errors import DataError, RecipeError
from rlpost.policy.policy import Policy
from rlpost.policy.score import logprobs
from rlpost.recipe.resolve import resolve

ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}" * (1 + n % 3), "label": n % 2 == 0} for n in range(6)]
BY_LABEL = {**SFT, "data": {"rows": {"path": "labelled.jsonl"}}, "batch_size": 6}
BY_LABEL |= {"loss": {"fn": "likelihood_by_label"}, "schedule": "constant", "steps": 40}
LORA_OR_NOT = pytest.mark.parametrize("lora", [(), (LORA,)], ids=["full", "lora"])


@pytest.fixture(autouse=True)
def rows(tmp_path) -> None:
    jsonl(tmp_path / "labelled.jsonl", ROWS)
    jsonl(tmp_path / "plain.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in ROWS])


def logp(model: Policy) -> list[Tensor]:
    """Of each row's tokens."""
    return [logprobs(model, [group(model, row["prompt"], row["completion"])]) for row in ROWS]


@LORA_OR_NOT
def test_what_is_unsafe_becomes_unlikely_and_the_rest_stays(tmp_path, lora):
    """From a model that knows all rows by heart."""
    learned = {**SFT, "data": {"rows": {"path": "plain.jsonl"}}, "batch_size": 6, "steps": 60, "start": "base"}
    rate = 5e-2 if lora else 2e-2
    final = run(
        tmp_path,
        {"learned": {**learned, "learning_rate": rate}, "unlearned": {**BY_LABEL, "learning_rate": rate / 2}},
        *lora,
    )
    before, after = logp(policy(tmp_path / "runs/run/learned/final")), logp(policy(final))
    for row, old, new in zip(ROWS, before, after, strict=True):
        assert float(old.sum().exp()) > 0.3
        if row["label"]:
            assert float(new.sum() - old.sum()) > -0.1
        else:
            assert float(new.sum() - old.sum()) < -3
    assert_only_the_policy_moved(tmp_path, "unlearned", bool(lora))


@LORA_OR_NOT
def test_the_first_loss_is_what_the_base_model_says_by_hand(tmp_path, lora):
    """With one completion a pass, too: labels go with their rows."""
    loss = {"fn": "likelihood_by_label", "args": {"alpha": 0.5}}
    first = {**BY_LABEL, "loss": loss, "steps": 1, "start": "base"}
    run(tmp_path, {"whole": first, "cut": {**first, "max_tokens_per_microbatch": 1}}, *lora)
    said, unsaid = (
        torch.cat([x for row, x in zip(ROWS, logp(policy(base(tmp_path))), strict=True) if row["label"] is wanted])
        for wanted in (True, False)
    )
    expected = (-said.sum() - 0.5 * (1 - unsaid.exp()).log().sum()) / 18  # 2 + 3 + 4 tokens, twice
    for name in ("whole", "cut"):
        (line,) = metrics(tmp_path, name)
        assert line["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert line["nll"] == pytest.approx(-float(said.mean()), rel=1e-5)
        assert line["unsaid_nll"] == pytest.approx(-float(unsaid.mean()), rel=1e-5)
        assert line["tokens"] == 18


def test_rows_without_labels_are_refused_before_anything_loads(tmp_path):
    with pytest.raises(DataError, match=r"stages\.sft\.data\.rows .* needed are \(prompt, completion, label\)"):
        run(tmp_path, {"sft": {**BY_LABEL, "data": {"rows": {"path": "plain.jsonl"}}}})
    assert not base(tmp_path).exists()


def test_a_users_loss_of_labels(tmp_path):
    (tmp_path / "mine.py").write_text("def signed(logp_N, label_N):\n    return logp_N * (1 - 2 * label_N.float())\n")
    run(tmp_path, {"sft": {**BY_LABEL, "steps": 1, "loss": {"fn": "mine.py:signed"}}})
    every = logp(policy(base(tmp_path)))
    expected = sum(float(x.sum()) * (-1 if row["label"] else 1) for row, x in zip(ROWS, every, strict=True)) / 18
    assert metrics(tmp_path, "sft")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_labels_and_whole_distributions_do_not_go_together(tmp_path):
    (tmp_path / "mine.py").write_text("def both(logp_NV, label_N):\n    return logp_NV.mean(1) * label_N\n")
    with pytest.raises(RecipeError, match=r"takes only logp_N besides; remove logp_NV"):
        run(tmp_path, {"sft": {**BY_LABEL, "steps": 1, "loss": {"fn": "mine.py:both"}}})


def test_a_label_of_the_task_is_shown_with_its_format():
    lines = list(show_rows(resolve("safety", []), 0))
    assert any("addition.labelled" in line and "read as prompt, completion, label" in line for line in lines)
