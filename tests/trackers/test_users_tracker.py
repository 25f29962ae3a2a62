"""Mirrors of a run, seen by a user's own tracker: what it is sent, once each, whatever fails."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reading import logged
from test_pipeline import EVALUATION
from tiny_recipes import GRPO, SFT, prepared, run, sha256, write

from rlpost.cli.app import main
from rlpost.errors import RecipeError
from rlpost.pipeline import preflight
from rlpost.trackers.api import About
from rlpost.trackers.mirror import Mirror
from rlpost.trackers.mirrors import Mirrors

STAGES = {"sft": {**SFT, "steps": 3}, "grpo": {**GRPO, "steps": 2}}
OWN = """\
import json
import random
from pathlib import Path

FAILS = {fails}


class Lines:
    def __init__(self, file, config):
        self.file = file
        self.write("config", 0, config["model"]["precision"])

    def write(self, *what):
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def log(self, step, metrics):
        print("logging", random.random())
        if FAILS and "sft/loss" in metrics and step == 2:
            raise RuntimeError("the server\\nsays no")
        self.write("log", step, metrics)

    def table(self, step, name, columns, rows):
        self.write("table", step, {{name: [columns, rows]}})

    def close(self):
        self.write("closed", 0, {{}})


def lines(run, config):
    return Lines(Path(__file__).with_name("sent.jsonl"), config)


def nothing(run):
    return object()


def broken(config):
    raise OSError("no way there")
"""


def own(folder: Path, fails: bool = False) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN.format(fails=fails), "utf-8")
    return "logging.to=[own.py:lines]"


def sent(folder: Path, kind: str) -> dict[tuple[str, int], list[Any]]:
    """(name, step) -> all that was sent of it."""
    found: dict[tuple[str, int], list[Any]] = {}
    for what, step, content in map(json.loads, (folder / "sent.jsonl").read_text("utf-8").splitlines()):
        for name, value in content.items() if what == kind else ():
            found.setdefault((name, step), []).append(value)
    return found


def trained(folder: Path) -> dict[tuple[str, int], list[Any]]:
    return {key: value for key, value in sent(folder, "log").items() if not key[0].startswith("evaluation/")}


def test_it_is_sent_all_that_is_logged_and_changes_nothing(tmp_path, capsys):
    (tmp_path / "without").mkdir()
    run(tmp_path / "without", STAGES, evaluation=EVALUATION)
    assert not (tmp_path / "without/runs/run/trackers").exists()
    capsys.readouterr()
    folder = tmp_path / "with"
    run(folder, STAGES, own(folder), evaluation={**EVALUATION, "every": 2})
    printed = capsys.readouterr()
    assert "logging" in printed.err
    assert "logging" not in printed.out
    plain, here = tmp_path / "without/runs/run", folder / "runs/run"
    for file in (*plain.glob("*/metrics.jsonl"), *plain.glob("*/final/*.safetensors"), *plain.glob("evaluation/*")):
        if file.suffix == ".proof":
            continue
        assert sha256(here / file.relative_to(plain)) == sha256(file), file
    assert trained(folder) == logged(here, "sft", "grpo")
    assert ("grpo/eval/greedy/accuracy", 2) in trained(folder)
    greedy = json.loads((here / "evaluation/grpo.json").read_text("utf-8"))["greedy"]["accuracy"]["all"]
    assert sent(folder, "log")["evaluation/greedy", 2] == [greedy["value"]]
    assert sent(folder, "log")["evaluation/greedy/low", 2] == [greedy["low"]]
    tables = sent(folder, "table")
    assert set(tables) == {
        *(("grpo/samples", step) for step in (1, 2)),
        *((f"evaluation/{name}", step) for step in range(3) for name in ("samples", "stages")),
    }
    (columns, rows), *more = tables["grpo/samples", 2]
    assert not more
    assert columns == ["prompt", "completion", "reward"]
    rollouts = json.loads((here / "grpo/rollouts/step-000002.jsonl").read_text("utf-8").splitlines()[0])
    first = rollouts["completions"][0]
    assert rows[0] == [rollouts["example"]["prompt"], first["text"], first["reward"]]
    assert len(rows) == 8
    assert [row[0] for row in tables["evaluation/stages", 2][0][1]] == ["base", "sft", "grpo"]
    # A tracker that is added to a finished run is sent everything too.
    run(tmp_path / "without", STAGES, own(tmp_path / "without"), evaluation=EVALUATION)
    assert sent(tmp_path / "without", "table") == sent(folder, "table")
    assert sent(tmp_path / "without", "log") == {k: v for k, v in sent(folder, "log").items() if "/eval/" not in k[0]}


def test_it_fails_is_said_once_and_is_sent_the_rest_later(tmp_path, capsys):
    run(tmp_path, STAGES, own(tmp_path, fails=True))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning") == 1
    assert "own.py:lines failed (RuntimeError: the server says no); the run goes on without it" in said
    assert set(trained(tmp_path)) == {key for key in logged(tmp_path / "runs/run", "sft") if key[1] == 1}
    run(tmp_path, STAGES, own(tmp_path))
    assert "warning" not in capsys.readouterr().err
    assert trained(tmp_path) == logged(tmp_path / "runs/run", "sft", "grpo")
    assert len(sent(tmp_path, "table")) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[tensorbord]", "logging.to[0]: no tracker 'tensorbord' - did you mean 'tensorboard'?"),
        ("[own.py:lines, own.py:lines]", "logging.to[1]: 'own.py:lines' stands twice - remove it"),
        ("[nowhere.py:lines]", "logging.to[0]: "),
        ("[own.py:linse]", "logging.to[0]: no function 'linse'"),
        ("[own.py:lines, wandb]", "logging.to[1]: wandb is not installed - pip install 'rlpost[wandb]'"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, given, said):
    own(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError) as refused:
        preflight(prepared(tmp_path, {"sft": SFT}, f"logging.to={given}"), rows=False)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_command_ends_with_the_command_that_installs(tmp_path, monkeypatch, capsys):
    write(tmp_path, {"sft": SFT})
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(sys, "argv", ["rlpost", "train", str(tmp_path / "tiny.yaml"), "logging=mlflow"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "logging.to[0]: mlflow is not installed - pip install 'rlpost[mlflow]'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_one_that_cannot_be_made(tmp_path, capsys):
    own(tmp_path)
    with pytest.raises(RecipeError, match=r"logging.to\[0\]: what nothing returns has no method 'log'"):
        run(tmp_path, {"sft": {**SFT, "steps": 1}}, "logging.to=[own.py:nothing]")
    run(tmp_path, {"sft": {**SFT, "steps": 1}}, "logging.to=[own.py:broken]")
    said = " ".join(capsys.readouterr().err.split())
    assert "own.py:broken cannot be opened" in said
    assert "no way there" in said
    assert (tmp_path / "runs/run/sft/DONE").exists()


class Memory:
    def __init__(self, _journal=()):
        self.sent = []

    def log(self, step, metrics):
        random.random()
        np.random.rand()
        self.sent.append((step, metrics))

    def table(self, step, name, _columns, _rows):
        self.sent.append((step, name))

    def close(self):
        pass


class Forgetful(Memory):
    def held(self):
        return {("sft", 1)}


def mirror(folder: Path, tracker: Any) -> Mirror:
    return Mirror("own.py:f", About(folder, "id", "p", {}, folder / "trackers"), lambda _: tracker)


def test_a_journal_that_was_cut_off(tmp_path):
    mirror(tmp_path, Memory()).log("sft", 1, {"loss": 1.0})
    journal = tmp_path / "trackers/own.py.f.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"series": "sft", "st')
    tracker = Memory()
    opened = mirror(tmp_path, tracker)
    for step in (1, 2):
        opened.log("sft", step, {"loss": 1.0})
    assert tracker.sent == [(2, {"sft/loss": 1.0})]
    assert [json.loads(line)["step"] for line in journal.read_bytes().splitlines()] == [1, 2]


def test_a_tracker_that_lost_something_is_sent_it_again(tmp_path):
    opened = mirror(tmp_path, Memory())
    for step in (1, 2, 3):
        opened.log("sft", step, {"loss": 1.0})
    tracker = Forgetful()
    opened = mirror(tmp_path, tracker)
    for step in (1, 2, 3):
        opened.log("sft", step, {"loss": 1.0})
    assert [step for step, _ in tracker.sent] == [2, 3]


def test_other_values_than_before_are_said_once(tmp_path, capsys):
    opened = mirror(tmp_path, Memory())
    for step in (1, 2):
        opened.log("sft", step, {"loss": 1.0})
    for step in (1, 2, 3):
        opened.log("sft", step, {"loss": 2.0})
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning") == 1
    assert "other values of sft from step 1 on" in said


def test_its_random_numbers_are_its_own(tmp_path):
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    mirror(tmp_path, Memory()).log("sft", 1, {"loss": 1.0})
    assert (random.random(), np.random.rand()) == expected


def test_without_a_tracker_no_file_is_read(tmp_path):
    Mirrors().rollouts("grpo", tmp_path / "missing.jsonl")
    Mirrors().catch_up("grpo", tmp_path / "missing")
    Mirrors().evaluation("grpo", 0, {}, tmp_path / "missing.jsonl")
