"""Numbers that are not finite: nothing is trained on them, nothing is saved of them, and a saved one is passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_recipes import DPO, GRPO, LORA, PPO, PREFERENCES, SFT, TRPO, jsonl, metrics, write
from tiny_world import Ran, rlpost

from rlpost.policy.moving_reference import MovingReference
from rlpost.run.files import write_folder_atomically
from rlpost.run.manifest import read_manifest
from rlpost.stages import trpo

ROWS = {"batch_size": 4, "steps": 2, "learning_rate": 1e-3, "max_length": 16}
STEPS = [{"prompt": "1+1=", "steps": ["1+", f"{n}"], "labels": [1.0, float(n == 2)]} for n in (1, 2, 3, 4)]
LABELLED = [
    {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in PREFERENCES for k in r if k[0] in "cr"
]
STAGES = {
    "sft": {**SFT, "steps": 2},
    "dpo": {**DPO, "steps": 2},
    "kto": {"kind": "kto", "data": {"rows": {"path": "labelled.jsonl"}}, **ROWS},
    "reward_model": {"kind": "reward_model", "data": {"rows": {"path": "pairs.jsonl"}}, **ROWS},
    "process_reward_model": {"kind": "process_reward_model", "data": {"rows": {"path": "steps.jsonl"}}, **ROWS},
    "value": {
        "kind": "value",
        "data": SFT["data"],
        "steps": 2,
        "prompts_per_step": 4,
        "group_size": 2,
        "learning_rate": 1e-3,
        "sampling": {"max_new_tokens": 2},
        "goals": {"texts": ["1"], "truncated_counts": True},
        "max_length": 20,
    },
    "grpo": {**GRPO, "steps": 2},
    "online_dpo": {**GRPO, "kind": "online_dpo", "steps": 2},
    "ppo": {**PPO, "steps": 2},
}
AT = dict.fromkeys(STAGES, 2) | {"ppo": 4}
"""The optimiser's step that is the policy's last one."""
LOSSES = """\
def nan(logp_N):
    return -logp_N + float("nan")


def late(logp_N, *, after: float = 0.0):
    return -logp_N + (float("inf") if float(-logp_N.mean()) < after else 0.0)
"""


def prepare(folder: Path, name: str, stage: dict, **more) -> Path:
    jsonl(folder / "labelled.jsonl", LABELLED)
    jsonl(folder / "steps.jsonl", STEPS)
    (folder / "losses.py").write_text(LOSSES, "utf-8")
    return write(folder, {name: {**stage, **more}})


def poison_step(monkeypatch: pytest.MonkeyPatch, at: int, moments: bool = False) -> None:
    """The optimiser's `at`-th step leaves an infinity in the last weight, or in its second moment."""
    step, calls = torch.optim.AdamW.step, 0

    def poisoned(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        step(self, *args, **kwargs)
        if calls == at:
            p = [p for group in self.param_groups for p in group["params"]][-1]
            with torch.no_grad():
                (self.state[p]["exp_avg_sq"] if moments else p).flatten()[-1] = torch.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)


def kept_nothing(ran: Ran, folder: Path, name: str, *words: str) -> bool:
    """Exit 9 naming step 2 and a tensor; neither a result nor a checkpoint of that step."""
    stage = folder / "runs/run" / name
    left = [stage / "final", stage / "DONE", stage / "checkpoints/step-000002"]
    return ran.refused(9, f"{name}: step 2: ", "is not finite", *words) and not any(p.exists() for p in left)


@pytest.mark.parametrize("name", [n if n == "sft" else pytest.param(n, marks=pytest.mark.slow) for n in STAGES])
def test_an_overflow_at_the_last_update_leaves_no_result(tmp_path, name, monkeypatch, tally):
    file = prepare(tmp_path, name, STAGES[name], checkpoint_every=1)
    with monkeypatch.context() as patched:
        poison_step(patched, AT[name])
        assert kept_nothing(rlpost("train", file), tmp_path, name, "weights/")
    with monkeypatch.context() as patched:
        poison_step(patched, AT[name] // 2, moments=True)
        assert kept_nothing(rlpost("train", file), tmp_path, name, "optimizer/", "exp_avg_sq")
    done = rlpost("train", file)
    assert done.code == 0
    assert f"{name}: resumes after step 1 of 2" in done.err
    tally("numbers that are not finite", refused=2, right=1)


def poison_critic(monkeypatch) -> None:
    poison_step(monkeypatch, 3)


def poison_reference(monkeypatch) -> None:
    move = MovingReference.move

    def poisoned(self, share):
        lost = move(self, share)
        next(iter(self.weights().values())).flatten()[0] = torch.nan
        return lost

    monkeypatch.setattr(MovingReference, "move", poisoned)


def poison_search(monkeypatch) -> None:
    monkeypatch.setattr(trpo, "line_search", lambda *args, **kwargs: (torch.inf, 0.0, 0.0))


OTHERS = {
    # what is poisoned -> (stage, how, what the message names)
    "critic": ({**PPO, "steps": 2}, poison_critic, "critic_weights/"),
    "moving reference": ({**DPO, "steps": 2, "refresh": {"every": 2, "share": 0.5}}, poison_reference, "reference/"),
    "trust region": ({**TRPO, "steps": 1}, poison_search, "step_share"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_moves_is_looked_at_before_it_is_kept(tmp_path, what, monkeypatch, tally):
    stage, how, named = OTHERS[what]
    file = prepare(tmp_path, "stage", stage)
    with monkeypatch.context() as patched:
        how(patched)
        ran = rlpost("train", file)
    assert ran.refused(9, f"stage: step {stage['steps']}: {named}", "is not finite"), ran.err
    assert not (tmp_path / "runs/run/stage/final").exists()
    tally("numbers that are not finite", refused=1)


def test_a_loss_that_is_not_finite_stops_though_its_gradient_is(tmp_path, tally):
    file = prepare(tmp_path, "sft", SFT, loss={"fn": "losses.py:nan"})
    ran = rlpost("train", file)
    assert ran.refused(9, "sft: step 1, update 1: the loss is not finite (nan)", "learning_rate"), ran.err
    assert not (tmp_path / "runs/run/sft/metrics.jsonl").exists()
    # From the last checkpoint, with a loss that is right: what went wrong was not kept.
    file = prepare(tmp_path, "sft", {**SFT, "steps": 9}, checkpoint_every=1)
    late = prepare(
        tmp_path, "sft", {**SFT, "steps": 9}, checkpoint_every=1, loss={"fn": "losses.py:late", "args": {"after": 2.3}}
    )
    ran = rlpost("train", late)
    assert ran.refused(9, "the loss is not finite (inf)"), ran.err
    logged = len(metrics(tmp_path, "sft"))
    assert logged >= 1
    assert (tmp_path / f"runs/run/sft/checkpoints/step-{logged:06d}").is_dir()
    file = prepare(tmp_path, "sft", {**SFT, "steps": 9}, checkpoint_every=1)
    assert rlpost("train", file, "--allow-change").code == 0
    assert [row["step"] for row in metrics(tmp_path, "sft")] == list(range(1, 10))
    assert all(row["loss"] is not None for row in metrics(tmp_path, "sft"))
    tally("numbers that are not finite", refused=2, right=1)


@pytest.mark.parametrize("way", [(), pytest.param((LORA,), marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("file", ["weights", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_a_checkpoint_that_is_not_finite_is_passed_over_for_an_older_one(tmp_path, way, file, tally):
    recipe = prepare(tmp_path, "sft", SFT, checkpoint_every=1, keep_checkpoints=3)
    assert rlpost("train", recipe, *way).code == 0
    stage = tmp_path / "runs/run/sft"
    good = {p.name: p.read_bytes() for p in (stage / "final").glob("*.safetensors")}
    (stage / "DONE").unlink()
    for step in (3, 4):
        rewrite(stage / f"checkpoints/step-{step:06d}", file)
    ran = rlpost("train", recipe, *way)
    assert ran.code == 0
    for step in (3, 4):
        assert f"step-{step:06d}: " in ran.err
    assert f"in {file}.safetensors is not finite; going on from step-000002" in ran.err
    assert {p.name: p.read_bytes() for p in (stage / "final").glob("*.safetensors")} == good
    tally("numbers that are not finite", right=2)


def rewrite(checkpoint: Path, name: str) -> None:
    """A checkpoint that holds an infinity, and was saved so."""
    about = read_manifest(checkpoint)["about"]
    kept = checkpoint.with_name("aside")
    shutil.copytree(checkpoint, kept)
    tensors = load_file(kept / f"{name}.safetensors")
    next(x for x in tensors.values() if x.ndim > 1).flatten()[0] = torch.inf

    def fill(folder: Path) -> None:
        for path in kept.iterdir():
            if path.name not in (f"{name}.safetensors", "MANIFEST.json"):
                shutil.copy(path, folder)
        save_file(tensors, folder / f"{name}.safetensors")

    write_folder_atomically(checkpoint, fill, about)
    shutil.rmtree(kept)
