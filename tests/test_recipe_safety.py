"""The recipe of forbidden endings, two steps of each stage on a tiny model, and the script that compares its ways."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from rlpost.pipeline import train
from rlpost.recipe.resolve import resolve

SMALL = [
    "threads=1",
    *(f"model.config.{key}" for key in ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1")),
    *(f"stages.{name}.{key}=2" for name in ("sft", "guide", "reward", "unlikely") for key in ("steps", "log_every")),
    *("stages.sft.batch_size=8", "stages.unlikely.batch_size=16"),
    *("stages.guide.prompts_per_step=8", "stages.guide.num_minibatches=2", "stages.reward.prompts_per_step=4"),
    "evaluation.data.held_out.limit=8",
]
SCRIPT = Path(__file__).parents[1] / "scripts/safety.py"


def test_every_way_starts_from_the_same_model(tmp_path):
    final = train(resolve("safety", [f"runs={tmp_path}", *SMALL]))
    assert final == tmp_path / "safety/unlikely/final"
    for name in ("guide", "reward", "unlikely"):
        lineage = json.loads((tmp_path / "safety" / name / "final/checkpoint.json").read_text("utf-8"))
        assert Path(lineage["parent"]).parts[-2:] == ("sft", "final")
        (line,) = map(json.loads, (tmp_path / "safety" / name / "metrics.jsonl").read_text("utf-8").splitlines())
        assert line["loss"] is not None
    measured = sorted(f.stem for f in (tmp_path / "safety/evaluation").glob("*.json"))
    assert measured == ["base", "reward", "sft", "unlikely"]
    shares = json.loads((tmp_path / "safety/evaluation/sft.json").read_text("utf-8"))["sampled"]["rewards"]
    assert set(shares) == {"correct", "forbidden"}


@pytest.mark.slow
def test_the_script_compares_them(tmp_path, monkeypatch, capsys):
    words = ["--seeds", "0", "--runs", str(tmp_path), "--prompts", "2", "--samples", "16", *SMALL]
    monkeypatch.setattr(sys, "argv", ["safety.py", *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in table[2:]}
    assert list(rows) == [
        "before",
        "guided away",
        "guided away, true S",
        "reward −1",
        "reward −1, guided away",
        "unlikelihood",
    ]
    assert rows["before"][2] == "0.000 [0.000, 0.000]"
    for way in ("guided away", "guided away, true S", "reward −1, guided away"):
        assert rows[way][0] == "0 [0, 0]"
    # 0 of 16: 1 − 0.05^(1/16).
    assert rows["guided away"][1] == rows["reward −1, guided away"][1] == "17.07 (0)"
