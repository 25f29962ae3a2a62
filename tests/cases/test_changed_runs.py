"""What a run goes on with: the model it began with, the recipe it was trained with, changes that are really applied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_recipes import DPO, LORA, MODEL, SFT, base, metrics, sha256, write
from tiny_world import Ran, rlpost

from rlpost.run.stage import StageDirectory

EVERY = {"steps": 4, "checkpoint_every": 2}
SHORT = {**DPO, **EVERY, "schedule": "constant"}
EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 2}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 2},
    "samples": 0,
}


def killed(*words: object, stage: str = "dpo", step: int = 3) -> None:
    """Train until a stage is about to log a step."""
    log = StageDirectory.log

    def stop(self, at, numbers):
        if self.path.name == stage and at == step:
            raise KeyboardInterrupt
        log(self, at, numbers)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StageDirectory, "log", stop)
        assert rlpost("train", *words).code == 130


def model_at(folder: Path) -> dict:
    """The recipe's model as one that lies in a folder, with its tokenizer."""
    write(folder, {"dpo": {**SHORT, "steps": 1}})
    assert rlpost("train", folder / "tiny.yaml", "run=maker").code == 0
    shutil.copytree(base(folder, "maker"), folder / "model", ignore=shutil.ignore_patterns("MANIFEST.json"))
    return {"path": str(folder / "model"), "precision": "float32"}


def nudge(model: Path) -> None:
    """The same model but for one weight."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")


def final(folder: Path, stage: str = "dpo", run: str = "run") -> str:
    (file,) = (folder / "runs" / run / stage / "final").glob("*.safetensors")
    return sha256(file)


def resolved(folder: Path) -> dict:
    return yaml.safe_load((folder / "runs/run/config.resolved.yaml").read_text("utf-8"))


@pytest.mark.parametrize("way", [(), pytest.param((LORA,), marks=pytest.mark.slow)], ids=["full", "lora"])
def test_another_model_under_the_same_path_is_refused(here, way, tally):
    file = write(here, {"dpo": SHORT}, model=model_at(here))
    killed(file, *way)
    whole = (here / "model/model.safetensors").read_bytes()
    nudge(here / "model")
    for words in ((), ("--allow-change",)):
        ran = rlpost("train", file, *way, *words)
        assert ran.refused(4, "model.path: ", "model.safetensors has changed; restore it or choose another run=NAME")
    (here / "model/model.safetensors").write_bytes(whole)
    (here / "model/README.md").write_text("# Filled in later")
    assert rlpost("train", file, *way).code == 0
    assert rlpost("train", file, *way, "run=whole").code == 0
    assert final(here) == final(here, run="whole")
    edit(here / "model/tokenizer_config.json", clean_up_tokenization_spaces=True)
    assert rlpost("train", file, *way).refused(4, "tokenizer_config.json has changed")
    tally("runs under another hand", right=1, refused=3)


def test_a_failed_start_does_not_pin_the_recipe(here, tally):
    model = model_at(here)
    file = write(here, {"dpo": SHORT}, model={**model, "path": str(here / "modle")})
    assert rlpost("train", file).code == 4
    file = write(here, {"dpo": SHORT}, model=model)
    ran = rlpost("train", file)
    assert ran.code == 0
    assert resolved(here)["model"]["path"] == model["path"]
    # Nor does a base that has been made already.
    assert rlpost("train", write(here, {"dpo": SHORT}), "run=new", "stages.dpo.max_length=2").code == 3
    assert rlpost("train", write(here, {"dpo": SHORT}), "run=new", "seed=7").code == 0
    assert rlpost("train", write(here, {"dpo": SHORT}), "run=straight", "seed=7").code == 0
    assert final(here, run="new") == final(here, run="straight")
    tally("runs under another hand", right=2)


def test_the_recipes_precision_is_not_that_of_an_earlier_decision(here, tally):
    file = write(here, {"dpo": SHORT}, model={**MODEL, "precision": "auto"})
    killed(file)
    record = json.loads((here / "runs/run/decisions.json").read_text("utf-8"))
    other = "float32" if record["bfloat16"] else "bfloat16"
    said = f'model.precision: "auto" -> "{other}"'
    assert rlpost("train", file, f"model.precision={other}").refused(2, said, "--allow-change")
    killed(file, f"model.precision={other}", "--allow-change", step=4)
    changed = metrics(here, "dpo")[2]["loss"]
    killed(file, "run=plain", step=4)
    assert changed != metrics(here, "dpo", "plain")[2]["loss"]
    assert metrics(here, "dpo")[:2] == metrics(here, "dpo", "plain")[:2]
    tally("changes of settings", right=1, refused=1)


def test_a_finished_stage_that_is_made_longer_ends_as_one_that_was_long(here, tally):
    file = write(here, {"dpo": SHORT})
    assert rlpost("train", file).code == 0
    longer = ("stages.dpo.steps=7",)
    assert rlpost("train", file, *longer).refused(2, "stages.dpo.steps: 4 -> 7", "--allow-change")
    killed(file, *longer, "--allow-change", step=6)
    ran = rlpost("train", file, *longer)
    assert ran.code == 0, ran.err
    assert "dpo: resumes after step 4 of 7" in ran.err
    assert rlpost("train", file, *longer, "run=whole").code == 0
    assert final(here) == final(here, run="whole")
    assert metrics(here, "dpo") == metrics(here, "dpo", "whole")
    assert resolved(here)["stages"]["dpo"]["steps"] == 7
    changes = json.loads((here / "runs/run/run.json").read_text("utf-8"))["changes"]
    assert changes == [
        {"at": {"stage": None, "step": None}, "changes": [{"key": "stages.dpo.steps", "old": "4", "new": "7"}]}
    ]
    assert rlpost("train", file, "stages.dpo.steps=5", "--allow-change").refused(2, "dpo is finished")
    tally("changes of settings", right=1, refused=2)


@pytest.mark.slow
def test_a_stage_is_not_made_longer_under_what_was_trained_from_it(here, tally):
    file = write(here, {"dpo": SHORT, "more": SHORT})
    assert rlpost("train", file).code == 0
    words = ("stages.dpo.steps=7", "--allow-change")
    ran = rlpost("train", file, *words)
    assert ran.refused(2, "more was trained from dpo as it is", "remove ", "runs/run/more")
    shutil.rmtree(here / "runs/run/more")
    assert rlpost("train", file, *words).code == 0
    assert rlpost("train", file, "stages.dpo.steps=7", "run=whole").code == 0
    assert final(here, "more") == final(here, "more", "whole")
    tally("changes of settings", right=1, refused=1)


@pytest.mark.slow
def test_a_stage_whose_start_came_out_different_is_refused(here, tally):
    file = write(here, {"dpo": SHORT, "more": SHORT})
    killed(file, stage="more")
    shutil.rmtree(here / "runs/run/dpo")
    # The folder that was removed is made anew from other rows: what `more` began from is gone.
    rows = (here / "pairs.jsonl").read_text("utf-8").splitlines(keepends=True)
    file.with_name("pairs.jsonl").write_text("".join(rows[::-1]), "utf-8")
    ran = rlpost("train", file, "--allow-change")
    assert ran.refused(
        4, "more: ", "runs/run/dpo/final is not the one training began with: model.safetensors has changed"
    )
    tally("runs under another hand", refused=1)


NOT_APPLIED = {
    "model.config.hidden_size=64": "model.config.hidden_size: 32 -> 64",
    "model.tokenizer.alphabet='0123456789+=x'": "model.tokenizer.alphabet: ",
    LORA: "model.lora",
    "seed=3": "seed: 0 -> 3",
    "stages.dpo.refresh={every: 2, share: 0.5}": "the checkpoints of dpo stand on it",
    "stages.dpo.steps=1": "2 steps are done",
}


def test_a_change_that_cannot_be_applied_is_refused(here, tally):
    file = write(here, {"dpo": SHORT})
    killed(file)
    before = {p: p.read_bytes() for p in (here / "runs/run").rglob("*") if p.is_file() and p.suffix != ".pid"}
    for words, reason in NOT_APPLIED.items():
        ran = rlpost("train", file, words, "--allow-change")
        assert ran.refused(2, reason), (words, ran)
        assert {p: p.read_bytes() for p in before} == before
    assert rlpost("train", file).code == 0
    tally("changes of settings", refused=len(NOT_APPLIED))


@pytest.mark.slow
def test_a_setting_of_an_unfinished_stage_takes_effect_from_its_checkpoint_on(here, tally):
    file = write(here, {"dpo": {**SHORT, "nll_coef": 0.1}})
    killed(file)
    assert rlpost("train", file, "stages.dpo.nll_coef=0.9", "--allow-change").code == 0
    assert rlpost("train", file, "run=whole").code == 0
    rows, whole = metrics(here, "dpo"), metrics(here, "dpo", "whole")
    assert rows[:2] == whole[:2]
    assert rows[2]["loss"] != whole[2]["loss"]
    assert resolved(here)["stages"]["dpo"]["nll_coef"] == 0.9
    old = yaml.safe_load((here / "runs/run/config.resolved.1.yaml").read_text("utf-8"))
    assert old["stages"]["dpo"]["nll_coef"] == 0.1
    tally("changes of settings", right=1)


@pytest.mark.slow
def test_a_filled_in_model_card_is_no_damage(here, tally):
    file = write(here, {"dpo": SHORT})
    assert rlpost("train", file, LORA).code == 0
    result = here / "runs/run/dpo/final"
    (result / "README.md").write_text("# What this adapter is for")
    (result / ".gitattributes").write_text("*.safetensors filter=lfs")
    before = final(here)
    ran = rlpost("train", file, LORA)
    assert ran.code == 0
    assert "dpo: done already" in ran.err
    assert final(here) == before
    (result / "chat_template.jinja").write_text("{{ messages }}")
    assert rlpost("train", file, LORA).refused(5, "chat_template.jinja was not written with it; ")
    tally("runs under another hand", right=1, refused=1)


def test_a_damaged_evaluation_is_made_again(here, tally):
    file = write(here, {"sft": {**SFT, "steps": 1}}, evaluation=EVALUATION)
    assert rlpost("train", file).code == 0
    folder = here / "runs/run/evaluation"
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert sorted(whole) == ["base.json", "base.jsonl", "base.proof", "sft.json", "sft.jsonl", "sft.proof"]
    (folder / "sft.json").write_bytes(b"")
    (folder / "base.jsonl").write_bytes(whole["sft.jsonl"])
    assert_repaired(rlpost("train", file), folder, whole, "sft.json is missing or has changed", "base.jsonl is missing")
    for ending in ("json", "jsonl", "proof"):
        shutil.copy(folder / f"base.{ending}", folder / f"sft.{ending}")
    assert_repaired(rlpost("train", file), folder, whole, "they belong to another stage or run; sft is evaluated again")
    (folder / "sft.proof").write_bytes(b"[")
    assert_repaired(rlpost("train", file), folder, whole, "sft.proof is missing or damaged; sft is evaluated again")
    tally("damaged run files", right=4)


def assert_repaired(ran: Ran, folder: Path, whole: dict[str, bytes], *words: str) -> None:
    assert ran.code == 0
    assert all(word in ran.err for word in words), ran.err
    now = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert {n: x for n, x in now.items() if "proof" not in n} == {n: x for n, x in whole.items() if "proof" not in n}


@pytest.mark.slow
def test_changed_logs_of_a_finished_stage_are_told_by_train_and_eval(here, tally):
    file = write(here, {"dpo": SHORT}, evaluation=EVALUATION)
    assert rlpost("train", file).code == 0
    log = here / "runs/run/dpo/metrics.jsonl"
    log.write_text(log.read_text("utf-8").replace("1", "2", 1), "utf-8")
    for words in (("train", file), ("eval", "runs/run"), ("eval", "runs/run/dpo")):
        ran = rlpost(*words)
        assert ran.code == 0
        assert "dpo/metrics.jsonl: has changed since it was written; it no longer shows what happened" in ran.err
    tally("damaged run files", right=3)


@pytest.mark.slow
def test_an_infinity_in_the_base_never_reaches_a_result(here, tally):
    model = model_at(here)
    tensors = load_file(here / "model/model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.inf)
    save_file(tensors, here / "model/model.safetensors", metadata={"format": "pt"})
    ran = rlpost("train", write(here, {"dpo": SHORT}, model=model))
    assert ran.code in (4, 9)
    assert "Traceback" not in ran.err
    assert not (here / "runs/run/dpo/final").exists()
    tally("numbers that are not finite", refused=1)
