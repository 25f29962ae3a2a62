"""Evaluating while a stage trains changes nothing of training; the best weights are kept; a stage may stop early."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import Trap, finish
from safetensors.torch import load_file
from tiny_recipes import DPO, GRPO, LORA, SFT, jsonl, metrics, prepared, run, sha256, weights, write

from rlpost.errors import DiskError, Interrupted
from rlpost.evaluate.params import Evaluation
from rlpost.pipeline import train
from rlpost.train.evaluation import StageEvaluation
from rlpost.usercode.stop import Stopped

HELD_OUT = {"held": {"task": {"fn": "addition.held_out"}, "limit": 8}}
EVALUATION = {
    "data": HELD_OUT,
    "rewards": [{"fn": "addition.correct", "weight": 0.5}, {"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 5},
    "samples": 2,
    "pass_at": [2],
    "slices": ["carry"],
    "every_stage": False,
}
PREFERENCES = {"some": {"path": "pairs.jsonl"}}
OVERFITS = {
    **SFT,
    "data": {"problems": {"task": {"fn": "addition.train"}, "limit": 4}},
    "learning_rate": 3e-3,
    "schedule": "constant",
    "steps": 60,
    "checkpoint_every": 7,
    "keep_checkpoints": 1,
    "eval_data": HELD_OUT,
    "eval_every": 3,
    "keep_best": {"metric": "loss", "patience": 2},
}
"""Learns four sums by heart, so that held-out ones get worse soon."""


def rows(folder: Path, stage: str, run: str = "run") -> list[dict[str, float]]:
    text = (folder / "runs" / run / stage / "evaluations.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def about(folder: Path, stage: str, run: str = "run") -> dict:
    return json.loads((folder / "runs" / run / stage / "final/checkpoint.json").read_text("utf-8"))


def trained(run: Path) -> dict[str, str]:
    """sha256 of all that training left: tensors, random state, logs and samples."""
    kept = [*run.rglob("*.safetensors"), *run.rglob("metrics.jsonl"), *run.glob("*/rollouts/*")]
    return {str(f.relative_to(run)): sha256(f) for f in kept}


def test_evaluating_changes_no_bit_of_training(tmp_path):
    stages = {
        "sft": {**SFT, "eval_data": HELD_OUT, "checkpoint_every": 1},
        "dpo": {**DPO, "eval_data": PREFERENCES, "checkpoint_every": 3, "loss": {"fn": "aot"}},
        "grpo": {**GRPO, "num_minibatches": 2, "kl": {"beta": 0.05}, "checkpoint_every": 3},
    }
    dropout = "model.lora={r: 4, alpha: 8, dropout: 0.1}"
    run(tmp_path, stages, dropout, "run=with", evaluation={**EVALUATION, "every": 2})
    bare = {name: {k: v for k, v in stage.items() if k != "eval_data"} for name, stage in stages.items()}
    run(tmp_path, bare, dropout, "run=without", evaluation=EVALUATION)
    expected = trained(tmp_path / "runs/without")
    assert len(expected) > 20
    assert trained(tmp_path / "runs/with") == expected
    assert not list((tmp_path / "runs/without").rglob("evaluations.jsonl"))
    for stage in stages:
        assert [row["step"] for row in rows(tmp_path, stage, "with")] == [2, 4]
    whole = Evaluation.model_validate(EVALUATION).metrics()
    assert list(rows(tmp_path, "grpo", "with")[0]) == ["step", *whole]
    assert list(rows(tmp_path, "sft", "with")[0]) == ["step", "loss", "nll", *whole]
    dpo = [*("loss", "preference_loss", "accuracy", "margin", "chosen_logratio", "rejected_logratio", "chosen_nll")]
    assert list(rows(tmp_path, "dpo", "with")[0]) == ["step", *dpo, *whole]


KINDS = {
    "kto": {**SFT, "kind": "kto", "data": {"x": {"path": "labelled.jsonl"}}},
    "reward_model": {**DPO, "kind": "reward_model"},
    "process_reward_model": {**SFT, "kind": "process_reward_model", "data": {"x": {"path": "steps.jsonl"}}},
    "ranked": {**DPO, "data": {"x": {"path": "ranked.jsonl"}}, "loss": {"fn": "dpo_plackett_luce"}},
    "labelled": {**SFT, "data": {"x": {"path": "labelled.jsonl"}}, "loss": {"fn": "likelihood_by_label"}},
}


@pytest.mark.slow
def test_held_out_rows_have_the_metrics_of_their_stage(tmp_path):
    """On the rows that a stage trains on, after a step too small to matter, they are those of training."""
    write(tmp_path, {})
    jsonl(
        tmp_path / "labelled.jsonl",
        [{"prompt": f"{a}+1=", "completion": str(a), "label": a % 2 == 0} for a in range(8)],
    )
    jsonl(
        tmp_path / "steps.jsonl", [{"prompt": f"{a}+1=", "steps": ["1", "2"], "labels": [1, a % 2]} for a in range(8)]
    )
    ranked = [{"prompt": f"{a}+1=", "completions": ["1", "2", "34"], "scores": [1.0, 0.5, a / 8]} for a in range(8)]
    jsonl(tmp_path / "ranked.jsonl", ranked)
    for name, stage in KINDS.items():
        stage = {**stage, "steps": 1, "batch_size": 9 if stage["kind"] == "reward_model" else 8, "learning_rate": 1e-12}
        stage |= {"eval_data": stage["data"], "eval_every": 1}
        resolved = prepared(tmp_path, {name: stage}, f"run={name}")
        train(resolved)
        (row,) = rows(tmp_path, name, name)
        names = resolved.config.stages[name].eval_metrics()
        assert list(row) == ["step", *names]
        logged = metrics(tmp_path, name, name)[0]
        # KTO's mismatched rows are drawn for each update.
        drawn = ("z", "loss") if name == "kto" else ()
        for key in names:
            assert key in drawn or row[key] == pytest.approx(logged[key], rel=1e-4, abs=1e-6), (name, key)


def left(run: Path) -> dict[str, str]:
    """sha256 of all that must not depend on where the run was interrupted, and which checkpoints there are."""
    logs = [*run.glob("*/metrics.jsonl"), *run.glob("*/evaluations.jsonl")]
    kept = [*run.glob("*/final/*.safetensors"), *run.glob("*/final/checkpoint.json"), *logs]
    found = {str(f.relative_to(run)): sha256(f) for f in kept if f.name != "checkpoint.json"}
    found |= {
        str(f.relative_to(run)): str(
            {k: v for k, v in json.loads(f.read_text("utf-8")).items() if k in ("step", "best")}
        )
        for f in kept
        if f.name == "checkpoint.json"
    }
    return found | {stage.name: str(saved(stage)) for stage in run.iterdir() if (stage / "checkpoints").exists()}


def saved(stage: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in (stage / "checkpoints").iterdir())


CHAIN = {"sft": OVERFITS, "dpo": {**DPO, "steps": 5, "checkpoint_every": 2, "keep_best": {"metric": "greedy/reward"}}}


def test_the_best_weights_are_the_result_and_the_next_stage_starts_from_them(tmp_path, capsys):
    run(tmp_path, CHAIN, evaluation={**EVALUATION, "every": 2})
    values = [row["loss"] for row in rows(tmp_path, "sft")]
    best = values.index(min(values))
    steps = [row["step"] for row in rows(tmp_path, "sft")]
    assert 0 < best < len(values) - 1
    assert steps == [3 * n for n in range(1, best + 4)], "it stops after two evaluations without a better loss"
    assert steps[-1] < 60
    stage = tmp_path / "runs/run/sft"
    assert saved(stage) == [steps[best], steps[-1]]
    assert [row["step"] for row in metrics(tmp_path, "sft")] == list(range(1, steps[-1] + 1))
    result, chosen = (
        weights(stage / "final"),
        load_file(stage / f"checkpoints/step-{steps[best]:06d}/weights.safetensors"),
    )
    last = load_file(stage / f"checkpoints/step-{steps[-1]:06d}/weights.safetensors")
    assert all(torch.equal(result[name.removeprefix("model.")], x) for name, x in chosen.items()), "bit for bit"
    assert any(not torch.equal(x, chosen[name]) for name, x in last.items())
    assert about(tmp_path, "sft")["step"] == steps[best]
    assert about(tmp_path, "sft")["best"] == {"metric": "loss", "value": min(values), "steps_done": steps[-1]}
    assert about(tmp_path, "dpo")["parent"].endswith("sft/final")
    told = capsys.readouterr().err
    assert f"sft: stopped early after step {steps[-1]}: 2 evaluations without a better loss" in told
    assert f"sft: the result is of step {steps[best]}, the best by loss" in told
    run(tmp_path, CHAIN, evaluation={**EVALUATION, "every": 2})
    assert "sft: done already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_result_is_made_again_from_the_best_checkpoint(tmp_path):
    stages = {"sft": OVERFITS}
    run(tmp_path, stages, LORA)
    here = tmp_path / "runs/run/sft"
    before = left(tmp_path / "runs/run")
    (adapter,) = (here / "final").glob("adapter_model.safetensors")
    adapter.write_bytes(b"damaged")
    run(tmp_path, stages, LORA)
    assert left(tmp_path / "runs/run") == before
    adapter.write_bytes(b"damaged")
    best = here / f"checkpoints/step-{about(tmp_path, 'sft')['step']:06d}"
    shutil.rmtree(best)
    with pytest.raises(
        DiskError, match=rf"{best.name}: is gone; restore it, or remove .*/sft to train the stage again"
    ):
        run(tmp_path, stages, LORA)


KILLS = [
    Trap("rlpost.train.evaluation:StageEvaluation.measure", 2),  # before the evaluation of step 6, which is the best
    Trap("rlpost.run.stage:StageDirectory.evaluation", 1),  # after it, before its row
    Trap("rlpost.train.loop:Loop._save", 1),  # after the row, before the checkpoint
    Trap("rlpost.run.stage:remove_folder", 1),  # after the checkpoint, before the one of step 3 is gone
    Trap("rlpost.run.stage:write_folder_atomically", 2),  # at step 12, which is the last by its evaluation
    Trap("rlpost.stages.context:save_policy", 1),  # stopped early, and the result not yet there
    Trap("rlpost.train.evaluation:StageEvaluation.measure", 2),  # in the next stage
]


@pytest.mark.slow
@pytest.mark.case
def test_killed_around_evaluations_it_ends_as_if_it_had_gone_through(tmp_path, tally):
    evaluation = {**EVALUATION, "every": 2}
    run(tmp_path, CHAIN, "run=whole", evaluation=evaluation)
    words = ["train", str(tmp_path / "tiny.yaml")]
    for number, kill in enumerate(KILLS):
        assert finish(words, tmp_path / f"killed{number}", kill) == -signal.SIGKILL, (kill, number)
    assert finish(words, tmp_path / "resumed") == 0
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")
    tally("kills", right=len(KILLS))


@pytest.mark.slow
@pytest.mark.case
def test_a_signal_before_or_during_an_evaluation_loses_and_doubles_none(tmp_path, tally):
    stages = {"grpo": {**GRPO, "steps": 6, "checkpoint_every": 50, "keep_best": {"metric": "greedy/reward"}}}
    evaluation = {**EVALUATION, "every": 2}
    run(tmp_path, stages, "run=whole", evaluation=evaluation)
    words = ["train", str(tmp_path / "tiny.yaml")]
    signals = [
        Trap("rlpost.run.stage:StageDirectory.timing", 2, signal.SIGTERM),  # step 2 is over and not evaluated
        Trap("rlpost.rewards.score:Scorer.score", 3, signal.SIGTERM),  # while it is evaluated
    ]
    for number, trap in enumerate(signals):
        assert finish(words, tmp_path / f"stopped{number}", trap) == 128 + signal.SIGTERM, trap
    assert finish(words, tmp_path / "resumed") == 0
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")
    tally("kills", right=len(signals))


@pytest.mark.slow
def test_a_call_that_a_signal_ends_during_an_evaluation_is_made_again(tmp_path, monkeypatch):
    stages = {"sft": {**SFT, "steps": 4, "checkpoint_every": 50, "keep_best": {"metric": "greedy/reward"}}}
    evaluation = {**EVALUATION, "every": 2}
    run(tmp_path, stages, "run=whole", evaluation=evaluation)
    before, calls = StageEvaluation.measure, []

    def stopped(self, models):
        calls.append(models)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped
        return before(self, models)

    monkeypatch.setattr(StageEvaluation, "measure", stopped)
    with pytest.raises(Interrupted, match="after step 4 with a checkpoint"):
        run(tmp_path, stages, evaluation=evaluation)
    assert saved(tmp_path / "runs/run/sft")[-1] == 4
    run(tmp_path, stages, evaluation=evaluation)
    assert left(tmp_path / "runs/run") == left(tmp_path / "runs/whole")


@pytest.mark.slow
def test_a_finished_stage_made_longer_goes_on_from_its_last_state(tmp_path):
    stage = {**OVERFITS, "keep_best": {"metric": "loss"}, "keep_checkpoints": 9, "checkpoint_every": 100}
    run(tmp_path, {"sft": {**stage, "steps": 40}}, "run=whole")
    run(tmp_path, {"sft": {**stage, "steps": 21}})
    train(prepared(tmp_path, {"sft": {**stage, "steps": 40}}), allow_change=True)
    found, expected = left(tmp_path / "runs/run"), left(tmp_path / "runs/whole")
    assert found.pop("sft") != expected.pop("sft"), "the state of step 21 is still there"
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("way", [(), (LORA,)], ids=["full", "lora"])
def test_a_judge_of_the_evaluation_beside_those_of_the_stage_changes_nothing(tmp_path, way):
    """With LoRA both are adapters on the base that is trained."""
    judged = [{"fn": "reward_model", "model": "judge"}, {"fn": "rewards.py:digits", "weight": 0.1}]
    stages = {
        "sft": {**SFT, "eval_every": 0},
        "judge": {**DPO, "kind": "reward_model", "eval_every": 0},
        "ppo": {**GRPO, "kind": "ppo", "rewards": judged, "kl": {"beta": 0.05}, "checkpoint_every": 3},
    }
    run(tmp_path, stages, *way, "run=with", evaluation={**EVALUATION, "judge": "judge", "every": 2})
    run(tmp_path, stages, *way, "run=without", evaluation=EVALUATION)
    assert trained(tmp_path / "runs/with") == trained(tmp_path / "runs/without")
    assert "sampled/judged" in rows(tmp_path, "ppo", "with")[0]
    assert not (tmp_path / "runs/with/sft/evaluations.jsonl").exists()
