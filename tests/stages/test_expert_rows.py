"""What a stage does with an expert's rows beside its own samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_recipes import GRPO, SFT, jsonl, metrics, prepared, run, weights

from rlpost.pipeline import train
from rlpost.stages import context
from rlpost.train.learner import Learner

ROWS: dict[str, Any] = {"answers": {"task": {"fn": "addition.held_out"}, "limit": 20}}
EXPERT: dict[str, Any] = {"data": ROWS, "batch_size": 6, "mu": {"peak": 0.3}}
STAGE: dict[str, Any] = {**GRPO, "steps": 2, "schedule": "constant", "num_minibatches": 2, "learning_rate": 1e-2}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(w, other[name]) for name, w in one.items())


def of_run(folder, stage: dict[str, Any], name: str, *words: str):
    return weights(run(folder, {"rl": stage}, f"run={name}", *words))


def test_a_weight_of_zero_is_the_stage_as_it_was_bit_for_bit(tmp_path):
    with_rows = of_run(tmp_path, {**STAGE, "expert": {**EXPERT, "mu": {"peak": 0.0}}}, "with")
    assert same(with_rows, of_run(tmp_path, STAGE, "without"))
    one, other = (metrics(tmp_path, "rl", name) for name in ("with", "without"))
    assert [{**line, "mu": 0.0} for line in other] == one


def test_a_weight_of_one_is_supervised_fine_tuning_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "stage_seed", lambda *_: 5)  # the rows come in one order
    alone = {"mu": {"peak": 1.0}, "loss": {"fn": "confidence_weighted"}, "weight": "sequence_mean"}
    mixed = of_run(tmp_path, {**STAGE, "expert": {**EXPERT, **alone}}, "mixed")
    sft = {**SFT, "data": ROWS, "batch_size": 6, "loss": alone["loss"], "weight": alone["weight"]}
    assert same(mixed, of_run(tmp_path, {**sft, "schedule": "constant", "learning_rate": 1e-2}, "sft"))
    assert [line["expert/nll"] for line in metrics(tmp_path, "rl", "mixed")] == pytest.approx(
        [sum(line["nll"] for line in pair) / 2 for pair in halves(metrics(tmp_path, "rl", "sft"))], rel=1e-6
    )


def halves(lines):
    return [lines[:2], lines[2:]]


@pytest.mark.slow
def test_the_gradient_is_the_weighted_sum_of_both_however_it_is_cut(tmp_path, monkeypatch):
    found: dict[str, tuple[torch.Tensor, dict[str, float]]] = {}
    update_on = Learner.update_on

    def kept(self, terms):
        line = update_on(self, terms)
        found["now"] = self.flat_gradient(), line
        return line

    monkeypatch.setattr(Learner, "update_on", kept)
    stage = {**STAGE, "steps": 1, "num_minibatches": 1, "max_grad_norm": 0.0}

    def gradient(peak: float, budget: int = 4096):
        expert = {**EXPERT, "mu": {"peak": peak}}
        of_run(tmp_path, {**stage, "expert": expert, "max_tokens_per_microbatch": budget}, f"r{peak}_{budget}")
        return found["now"]

    (own, _), (rows, of_rows) = gradient(0.0), gradient(1.0)
    for budget in (4096, 8):
        mixed, line = gradient(0.25, budget)
        assert float((mixed - 0.75 * own - 0.25 * rows).norm() / mixed.norm()) < 1e-5
        assert line["expert/loss"] == pytest.approx(of_rows["loss"], rel=1e-5)
        assert line["expert/nll"] == pytest.approx(of_rows["expert/nll"], rel=1e-5)
        assert "ratio" in line
    assert float(own.norm()) > 0.01
    assert float(rows.norm()) > 0.01


def test_it_resumes_within_the_rows_bit_for_bit(tmp_path, monkeypatch):
    mu = {"peak": 0.8, "valley": 0.2, "warmup_steps": 1, "decay_steps": 2}
    stage = {**STAGE, "steps": 3, "checkpoint_every": 1, "expert": {**EXPERT, "mu": mu}}
    whole = of_run(tmp_path, stage, "whole")
    update_on, calls = Learner.update_on, []

    def failing(self, terms):
        calls.append(terms)
        if len(calls) == 4:  # in the middle of the second step
            raise KeyboardInterrupt
        return update_on(self, terms)

    monkeypatch.setattr(Learner, "update_on", failing)
    recipe = prepared(tmp_path, {"rl": stage}, "run=killed")
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert same(weights(train(recipe)), whole)
    lines = metrics(tmp_path, "rl", "whole")
    assert metrics(tmp_path, "rl", "killed") == lines
    assert [line["mu"] for line in lines] == pytest.approx([0.0, 0.8, 0.5])
    assert ["expert/nll" in line for line in lines] == [False, True, True]


@pytest.mark.slow
def test_rows_are_not_added_to_a_run_that_has_begun(tmp_path):
    run(tmp_path, {"rl": {**STAGE, "checkpoint_every": 1}})
    more = prepared(tmp_path, {"rl": {**STAGE, "steps": 3, "expert": EXPERT}})
    with pytest.raises(Exception, match=r"stages\.rl\.expert\.data\.answers\S+: .* cannot be applied"):
        train(more, allow_change=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"loss": {"fn": "label_smoothing"}},
        {"data": {"rows": {"path": "labelled.jsonl"}}, "loss": {"fn": "likelihood_by_label"}},
    ],
    ids=["whole distributions", "labels"],
)
def test_any_supervised_loss_without_a_teacher(tmp_path, more):
    said = [{"prompt": f"{i}+1=", "completion": f"{i + 1}", "label": i % 2 == 0} for i in range(8)]
    jsonl(tmp_path / "labelled.jsonl", said)
    run(tmp_path, {"rl": {**STAGE, "expert": {**EXPERT, **more}}})
    assert all(line["expert/nll"] > 0 for line in metrics(tmp_path, "rl"))


@pytest.mark.slow
def test_beside_samples_that_are_drawn_ahead_and_beside_recorded_ones(tmp_path):
    run(tmp_path, {"rl": {**STAGE, "expert": EXPERT, "rollouts": {"staleness": 1}}}, "run=ahead")
    assert all(line["expert/nll"] > 0 for line in metrics(tmp_path, "rl", "ahead"))
    recorded = {"seen": {"path": str(tmp_path / "runs/ahead/rl/rollouts")}}
    run(tmp_path, {"rl": {**STAGE, "data": recorded, "recorded": True, "expert": EXPERT}}, "run=again")
    assert all(line["expert/nll"] > 0 for line in metrics(tmp_path, "rl", "again"))


def test_a_row_that_is_too_long_is_told_before_training(tmp_path):
    (tmp_path / "long.jsonl").write_text('{"prompt": "1+1=", "completion": "' + "2" * 30 + '"}\n')
    with pytest.raises(Exception, match=r"stages\.rl\.expert\.data\.rows.*long\.jsonl"):
        run(tmp_path, {"rl": {**STAGE, "expert": {**EXPERT, "data": {"rows": {"path": "long.jsonl"}}}}})
