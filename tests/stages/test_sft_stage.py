"""Supervised fine-tuning from a recipe to a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_recipes import LORA, SFT, base, greedy, group, jsonl, metrics, policy, run, weights

from rlpost.errors import DataError, DivergedError
from rlpost.policy.score import logprobs

ROWS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}" * (1 + n % 3)} for n in range(6)]
MEMORISE = {**SFT, "data": {"rows": {"path": "rows.jsonl"}}, "batch_size": 6, "steps": 60}
MEMORISE |= {"learning_rate": 2e-2, "schedule": "cosine", "warmup": 5}


def test_a_few_rows_are_learned_by_heart(tmp_path):
    jsonl(tmp_path / "rows.jsonl", ROWS)
    final = run(tmp_path, {"sft": MEMORISE})
    lines = metrics(tmp_path, "sft")
    assert lines[0]["nll"] > 2
    assert lines[-1]["nll"] < 0.01
    trained = policy(final)
    assert greedy(trained, *(row["prompt"] for row in ROWS)) == [row["completion"] for row in ROWS]
    assert all(not torch.equal(w, weights(final)[name]) for name, w in weights(base(tmp_path)).items())


def test_an_adapter_learns_and_the_base_stays(tmp_path):
    jsonl(tmp_path / "rows.jsonl", ROWS)
    final = run(tmp_path, {"sft": MEMORISE}, LORA)
    lines = metrics(tmp_path, "sft")
    assert lines[-1]["nll"] < 0.2 * lines[0]["nll"]
    moved = weights(final)
    assert all(("lora_A" in name) or ("lora_B" in name) for name in moved)
    assert all(float(w.abs().max()) > 0 for w in moved.values())
    assert not list(final.glob("model*.safetensors"))
    trained, untrained = policy(final), policy(base(tmp_path))
    frozen = dict(trained.causal_lm.named_parameters())
    for name, w in untrained.causal_lm.named_parameters():
        wrapped = name.replace("_proj.", "_proj.base_layer.")
        assert torch.equal(frozen[wrapped], w), name
    question = [group(trained, row["prompt"], row["completion"]) for row in ROWS]
    assert float(-logprobs(trained, question).mean()) < 0.3 * float(-logprobs(untrained, question).mean())


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # Completions of 2, 3 and 4 tokens, their end token included; max_length is 16.
        ("token_mean", lambda a, b, c: (a.sum() + b.sum() + c.sum()) / 9),
        ("sequence_mean", lambda a, b, c: (a.mean() + b.mean() + c.mean()) / 3),
        ("sequence_sum", lambda a, b, c: (a.sum() + b.sum() + c.sum()) / 3),
        ("constant_length", lambda a, b, c: (a.sum() + b.sum() + c.sum()) / 3 / 16),
    ],
)
def test_the_first_loss_is_what_the_base_model_says_by_hand(tmp_path, weight, expected):
    jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    settings = {**MEMORISE, "batch_size": 3, "steps": 1, "weight": weight, "tokens_per_pass": 1}
    run(tmp_path, {"sft": settings})
    model = policy(base(tmp_path))
    nll = [-logprobs(model, [group(model, row["prompt"], row["completion"])]) for row in ROWS[:3]]
    assert [len(x) for x in nll] == [2, 3, 4]
    (line,) = metrics(tmp_path, "sft")
    assert line["loss"] == pytest.approx(float(expected(*nll)), rel=1e-5)
    assert line["nll"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)
    assert line["tokens"] == 9


def test_what_is_logged(tmp_path):
    run(tmp_path, {"sft": {**SFT, "log_every": 2}})
    lines = metrics(tmp_path, "sft")
    assert [line["step"] for line in lines] == [2, 4]
    assert [set(line) for line in lines] == 2 * [{"step", "loss", "nll", "tokens", "grad_norm", "learning_rate"}]
    assert [line["learning_rate"] for line in lines] == pytest.approx([2e-2 * 0.75, 2e-2 * 0.25])
    timings = (tmp_path / "runs/run/sft/timings.jsonl").read_text("utf-8").splitlines()
    assert [set(json.loads(line)) for line in timings] == 2 * [{"step", "seconds"}]


def test_epochs_are_steps_enough_to_see_every_row_so_often(tmp_path):
    run(tmp_path, {"sft": {**SFT, "steps": None, "epochs": 2.5, "batch_size": 24}})
    assert len(metrics(tmp_path, "sft")) == 7  # 2.5 * 64 / 24 = 6.67
    assert sum(line["tokens"] for line in metrics(tmp_path, "sft")) == 7 * 24 * 4


def test_another_loss_is_named_in_the_recipe(tmp_path):
    run(tmp_path, {"sft": {**SFT, "loss": {"fn": "dynamic_fine_tuning"}, "steps": 1}})
    (line,) = metrics(tmp_path, "sft")
    assert 0 < line["loss"] < line["nll"]  # weighted by probabilities


def test_the_seed_is_all_that_chance_hangs_on(tmp_path):
    finals = [
        run(tmp_path, {"sft": SFT}, f"run={name}", f"seed={seed}") for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    one, same, other = (weights(final) for final in finals)
    assert all(torch.equal(w, same[name]) for name, w in one.items())
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert metrics(tmp_path, "sft", "a") == metrics(tmp_path, "sft", "b") != metrics(tmp_path, "sft", "c")
    # From the same model too: the seed also deals the rows.
    model = {"path": str(base(tmp_path, "a")), "precision": "float32"}
    run(tmp_path, {"sft": SFT}, "run=d", "seed=4", model=model)
    assert metrics(tmp_path, "sft", "d")[0]["nll"] != metrics(tmp_path, "sft", "a")[0]["nll"]


def test_numbers_that_run_away_stop_the_run(tmp_path):
    with pytest.raises(DivergedError, match=r"update \d: the gradient of \S+ is not finite.*learning_rate"):
        run(tmp_path, {"sft": {**SFT, "learning_rate": 1e30}})
    assert not (tmp_path / "runs/run/sft/DONE").exists()


def test_no_row_is_longer_than_the_model_has_positions(tmp_path, capsys):
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2" * n} for n in (1, 40)])
    stage = {**SFT, "data": {"rows": {"path": "rows.jsonl"}}, "steps": 1, "max_length": 64}
    with pytest.raises(DataError, match=r"row 2 has 45 tokens, the limit is 32"):
        run(tmp_path, {"sft": stage})
    assert "limited by the model's 32 positions" in capsys.readouterr().err
    run(tmp_path, {"sft": {**stage, "too_long": "drop"}}, "run=dropped")
