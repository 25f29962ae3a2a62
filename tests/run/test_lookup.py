"""Finding runs and checkpoints by what a user types."""

import os
from pathlib import Path

import pytest
import yaml

from rlpost.errors import DiskError, ModelError
from rlpost.run.layout import find_checkpoint, list_runs, newest_finished_run
from rlpost.run.stage import StageDirectory


def make(runs: Path, name: str, stages: dict[str, bool], done: list[str], at: float = 0.0) -> Path:
    run = runs / name
    run.mkdir(parents=True)
    config = {
        "description": f"run {name}",
        "stages": {s: {"kind": "sft", "enabled": on} for s, on in stages.items()},
    }
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for stage in done:
        directory = StageDirectory(run / stage)
        directory.log(1, {"loss": 1.0})
        directory.save(1, {}, {}, keep=1)
        directory.finish(lambda f: (f / "weights").write_bytes(b"123") and None, {"stage": stage})
        os.utime(run / stage / "DONE", (at, at))
    return run


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make(Path("runs"), "old", {"sft": True, "dpo": True}, ["sft", "dpo"], at=100)
    make(Path("runs"), "new", {"sft": True, "dpo": True, "off": False}, ["sft", "dpo"], at=300)
    make(Path("runs"), "half", {"sft": True, "dpo": True}, ["sft"], at=900)
    return Path("runs")


def test_the_newest_finished_run(runs):
    assert newest_finished_run(runs) == runs / "new"


def test_no_finished_run(tmp_path):
    with pytest.raises(ModelError, match=r"no finished run; finish one with `rlpost train RECIPE`"):
        newest_finished_run(tmp_path)


def test_runs_at_a_glance(runs):
    StageDirectory(runs / "half" / "dpo").save(12, {}, {}, keep=1)
    told = {run.path.name: (run.stages, run.finished) for run in list_runs(runs)}
    assert told == {
        "half": ({"sft": "done", "dpo": "step 12"}, None),
        "new": ({"sft": "done", "dpo": "done"}, 300.0),
        "old": ({"sft": "done", "dpo": "done"}, 100.0),
    }
    assert list_runs(runs)[0].description == "run half"


@pytest.mark.parametrize("path", ["runs/new", "runs/new/", "runs/new/dpo", "runs/new/dpo/final", "./runs/new"])
def test_every_way_to_name_a_final_checkpoint(runs, path):
    assert find_checkpoint(path) == runs / "new" / "dpo" / "final"


def test_a_step_can_be_named(runs):
    step = runs / "new" / "sft" / "checkpoints" / "step-000001"
    assert find_checkpoint(step) == step


def test_an_unfinished_run_or_stage_says_what_to_take(runs):
    with pytest.raises(ModelError) as raised:
        find_checkpoint("runs/half")
    assert str(raised.value) == (
        "runs/half: stage dpo is not finished; run its `rlpost train` again to finish it, or take runs/half/sft"
    )
    StageDirectory(runs / "half" / "dpo").save(12, {}, {}, keep=1)
    with pytest.raises(ModelError) as raised:
        find_checkpoint("runs/half/dpo")
    assert str(raised.value).endswith("to finish it, or take runs/half/dpo/checkpoints/step-000012")


def test_a_damaged_checkpoint_is_refused(runs):
    (runs / "new" / "dpo" / "final" / "weights").write_bytes(b"124")
    with pytest.raises(DiskError, match=r"^runs/new/dpo/final: weights has changed since it was written; "):
        find_checkpoint("runs/new")


def test_models_that_are_not_ours_are_left_to_the_caller(runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for path in ("model", str(tmp_path / "model"), "gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "owner/name"):
        assert find_checkpoint(path) is None


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("runs/nwe", r"^runs/nwe: no such folder; did you mean runs/new\?$"),
        ("runs/new/dop", r"^runs/new/dop: no such folder; did you mean runs/new/dpo\?$"),
        ("runs/new/evaluatio", r"^runs/new/evaluatio: no such folder; give a run"),  # what is near is no choice
        ("./gpt2", r"^gpt2: no such folder; give a run"),
        ("/nowhere/model", r"^/nowhere/model: no such folder"),
        ("a/b/c", r"no such folder"),
        ("runs", r"^runs: no checkpoint here; did you mean runs/new\?$"),
        ("runs/new/dpo/checkpoints", r"^runs/new/dpo/checkpoints: no checkpoint here; give a run"),
    ],
)
def test_mistakes_are_told(runs, path, told):
    with pytest.raises(ModelError, match=told):
        find_checkpoint(path)


def test_a_file_is_no_checkpoint(runs):
    with pytest.raises(ModelError, match=r"no checkpoint here"):
        find_checkpoint("runs/new/config.resolved.yaml")
