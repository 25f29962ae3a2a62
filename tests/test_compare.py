"""`rlpost compare`: two checkpoints on the same prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_recipes import SFT, run

from rlpost.cli.app import main
from rlpost.evaluate.comparison import compare_scores
from rlpost.inference.compare import print_comparison

EVALUATION = {
    "data": {name: {"task": {"fn": "addition.held_out"}, "limit": n} for name, n in (("few", 4), ("more", 12))},
    "rewards": [{"fn": "rewards.py:cut_off"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 2,
}


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "compare", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_two_checkpoints_of_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    trained = run(tmp_path, {"sft": {**SFT, "steps": 2}}, evaluation={**EVALUATION, "every_stage": False})
    base = str(trained.parents[1] / "base")
    capsys.readouterr()
    assert command(monkeypatch, str(trained), str(trained), "--json") == 0
    same = json.loads(capsys.readouterr().out)["comparisons"]
    parts = [(mode, part, n) for mode in ("greedy", "sampled") for part, n in (("all", 16), ("few", 4), ("more", 12))]
    assert [(c["mode"], c["part"].removeprefix("source "), c["prompts"]) for c in same] == parts
    for c in same:
        assert (c["wins"], c["losses"], c["ties"], c["p"], c["verdict"]) == (0, 0, c["prompts"], 1.0, "within noise")
    assert command(monkeypatch, base, str(trained), "--json") == 0
    there = json.loads(capsys.readouterr().out)["comparisons"]
    assert command(monkeypatch, str(trained), base, "--json") == 0
    back = json.loads(capsys.readouterr().out)["comparisons"]
    assert any(c["wins"] + c["losses"] for c in there)
    assert [(c["a"], c["b"], c["wins"], c["losses"]) for c in there] == [
        (c["b"], c["a"], c["losses"], c["wins"]) for c in back
    ]
    assert command(monkeypatch, base, str(tmp_path / "absent")) == 4
    assert "absent: no such folder" in capsys.readouterr().err


def test_a_recipe_without_an_evaluation_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    trained = str(run(tmp_path, {"sft": {**SFT, "steps": 2}}))
    capsys.readouterr()
    assert command(monkeypatch, trained, trained) == 2
    assert "no `evaluation`; name a recipe that has one with --recipe" in capsys.readouterr().err


def test_scores_beyond_one_are_not_called_an_accuracy(capsys) -> None:
    shares = compare_scores("greedy", "all", [[0.0], [1.0]], [[1.0], [1.0]])
    print_comparison([shares])
    assert "B against A: held-out accuracy in %" in capsys.readouterr().err
    print_comparison([compare_scores("greedy", "all", [[0.0], [1.0]], [[5.0], [9.0]])])
    assert "B against A: held-out mean score × 100" in capsys.readouterr().err
