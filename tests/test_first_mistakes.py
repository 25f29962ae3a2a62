"""What a newcomer gets wrong with checkpoints: one line with the place and the remedy, the right exit code, no file."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from tiny_recipes import SFT, run

from rlpost.cli.app import main
from rlpost.errors import DataError, DiskError, ModelError, RecipeError, RlpostError

EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 4}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a finished run, and copies of it that something is wrong with."""
    made = tmp_path_factory.mktemp("mistakes")
    run(made, {"sft": {**SFT, "steps": 1}}, evaluation=EVALUATION)
    runs = made / "runs"
    for name in ("half", "cut", "hollow"):
        shutil.copytree(runs / "run", runs / name)
    shutil.rmtree(runs / "half/sft/final")
    (runs / "half/sft/DONE").unlink()
    weights = runs / "cut/sft/final/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    shutil.rmtree(runs / "hollow/sft")
    final = runs / "run/sft/final"
    ours = ("MANIFEST.json", "checkpoint.json")
    shutil.copytree(final, made / "mute", ignore=shutil.ignore_patterns(*ours, "token*"))
    shutil.copytree(final, made / "model", ignore=shutil.ignore_patterns(*ours))
    (made / "junk").mkdir()
    (made / "junk/config.json").write_text("{}")
    (made / "empty").mkdir()
    (made / "file.txt").write_text("hi")
    return made


NO_CHECKPOINT = "no checkpoint here; give a run"
LOADS = ("chat {}", "merge {} out", "serve {} --engine vllm", "push {} ada/sums", "compare runs/run {}")
FOLDERS: dict[str, tuple[type[RlpostError], str]] = {
    "file.txt": (ModelError, NO_CHECKPOINT),
    "empty": (ModelError, NO_CHECKPOINT),
    "./none": (ModelError, "none: no such folder"),
    "runs/half": (ModelError, "stage sft is not finished; run its `rlpost train` again"),
    "runs/hollow": (ModelError, "stage sft is not finished; run its `rlpost train` again"),
    "runs/cut": (DiskError, "model.safetensors has 100 bytes"),
}
OTHERS: dict[str, tuple[type[RlpostError], str]] = {
    "chat mute": (ModelError, "mute: it has no tokenizer; copy tokenizer.json and tokenizer_config.json"),
    "serve mute --engine vllm": (ModelError, "mute: it has no tokenizer"),
    "chat junk": (ModelError, "Should have a `model_type` key"),
    "chat model --system x": (ModelError, "--system: the model has no chat template"),
    "chat model --temperature 0": (RecipeError, "--temperature: expected more than 0"),
    "compare model model": (RecipeError, "name one with --recipe"),
    "compare runs/run nobody/model": (ModelError, "nobody/model: neither a local folder nor reachable on the hub"),
    "report nothere": (ModelError, "nothere: no run is here"),
    "report runs/run --out empty": (DiskError, "--out: 'empty' is a folder"),
    "merge runs/run empty": (DiskError, "empty: it exists already"),
    "merge runs/run ''": (DiskError, "OUT: an empty name"),
    "merge model out --dtype int8": (RecipeError, "'--dtype': 'int8' is not one of 'float32', 'bfloat16', 'float16'"),
    "serve model --engine tgi": (RecipeError, "'tgi' is not one of 'transformers', 'vllm'"),
    "serve model --port 0": (RecipeError, "'--port'"),
    "push model 'my model'": (RecipeError, "REPO: 'my model' is no name of a repository - write owner/name"),
    "push model": (RecipeError, "Missing argument 'REPO'"),
    "train runs/run": (RecipeError, "a run, not a recipe - its recipe is runs/run/config.resolved.yaml"),
    "copy demo nodir/x.yaml": (DiskError, "nodir/x.yaml: No such file or directory"),
    "sample model x": (DataError, "the tokenizer has no token for 'x'"),
}


@pytest.mark.parametrize("line", [*(form.format(folder) for form in LOADS for folder in FOLDERS), *OTHERS])
def test_a_mistake_is_one_line(place, monkeypatch, capsys, line):
    """A program `vllm` is there, so that nothing but the mistake is in the way."""
    words = shlex.split(line)
    error, told = OTHERS[line] if line in OTHERS else FOLDERS[next(f for f in FOLDERS if f in words)]
    (place / "vllm").write_text("#!/bin/sh\nexit 99\n")
    (place / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=":")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["rlpost", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert told in lines[0]
    assert caught.value.code == error.exit_code
    assert not (place / "out").exists()
