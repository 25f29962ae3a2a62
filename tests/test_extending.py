"""docs/extending.md: its files, as they stand there, are run and do what they are there for."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlpost.cli.app import main

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
FILES = dict(re.findall(r"(?ms)^```\w+ (\S+)\n(.*?)^```", PAGE.read_text("utf-8")))
"""Name -> text of every file on the page."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        (made / name).write_text(text, "utf-8")
    return made


@pytest.fixture
def train(folder: Path, monkeypatch, capsys):
    """`rlpost train NAME.yaml` in the folder, if that was not run yet: the folder of its only stage, and stderr."""

    def trained(name: str) -> tuple[Path, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["rlpost", "train", f"{name}.yaml"])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert caught.value.code == 0, printed.err
        return Path(printed.out.strip()).parent, printed.err

    return trained


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rollouts(stage: Path, step: int = 1) -> list[dict[str, Any]]:
    return lines(stage / "rollouts" / f"step-{step:06d}.jsonl")


def test_a_loss(train) -> None:
    stage, err = train("loss")
    assert "stages.dpo.loss: squared_hinge from" in err
    first, *_, last = lines(stage / "metrics.jsonl")
    assert first["loss"] == 1  # the policy is its reference yet: no margin
    assert last["loss"] < 0.5


def test_a_reward_and_an_engine_that_replays_its_run(train, folder) -> None:
    stage, _ = train("reward")
    evenness = runpy.run_path(str(folder / "evenness.py"))["evenness"]
    found = [c for row in rollouts(stage) for c in row["completions"]]
    wanted = [evenness(type("Completion", (), c), {}, most=2.0) for c in found]
    assert [c["reward"] for c in found] == wanted
    assert None in wanted
    assert len(set(wanted)) > 3
    replayed, err = train("engine")
    assert "rollouts: replay from" in err
    assert (replayed / "final/model.safetensors").read_bytes() == (stage / "final/model.safetensors").read_bytes()
    assert replayed != stage


def test_an_advantage(train) -> None:
    stage, _ = train("advantage")
    loss, tokens = 0.0, 0
    for row in rollouts(stage):
        rewards = [float("nan") if c["reward"] is None else c["reward"] for c in row["completions"]]
        reward_G = torch.tensor(rewards)
        advantage_G = (reward_G - reward_G.nanmedian()).sign().nan_to_num()
        for advantage, c in zip(advantage_G.tolist(), row["completions"], strict=True):
            loss -= advantage * sum(c["action"])
            tokens += sum(c["action"]) * (c["reward"] is not None)
    assert lines(stage / "metrics.jsonl")[0]["loss"] == pytest.approx(loss / tokens, abs=1e-6)
    assert abs(loss) > 0.1 * tokens


def test_an_environment(train) -> None:
    stage, _ = train("environment")
    found = [c for row in rollouts(stage) for c in row["completions"]]
    assert sum(0 in c["action"] for c in found) > len(found) / 2


def test_a_kind_of_stage(train) -> None:
    stage, err = train("kind")
    assert "stages.sft.kind: hardest from" in err
    first, *_, last = lines(stage / "metrics.jsonl")
    assert (first["kept"], last["step"]) == (2, 3)
    assert last["nll"] < first["nll"]


def test_a_data_format(train) -> None:
    _, err = train("format")
    assert "2 rows, read as prompt, completion" in err


def test_a_tracker(train) -> None:
    stage, _ = train("tracked")
    found = {tuple(line.split(",")) for line in (stage.parent / "all.csv").read_text("utf-8").splitlines()}
    logged = [(row.pop("step"), row) for row in lines(stage / "metrics.jsonl")]
    assert found == {(f"grpo/{name}", str(step), str(float(row[name]))) for step, row in logged for name in row}
    assert len(logged) == 2


def test_what_python_may_call_is_there() -> None:
    told = re.findall(r"`(rlpost(?:\.\w+)+)\.(\w+)`", PAGE.read_text("utf-8").partition("## From Python")[2])
    assert len(told) > 8
    for module, name in told:
        assert callable(getattr(importlib.import_module(module), name))
