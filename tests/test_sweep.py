"""`rlpost sweep`: all combinations as sibling runs, resumed, ordered by their evaluation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_recipes import SFT, write

import rlpost
from rlpost import pipeline, sweep
from rlpost.cli.app import main
from rlpost.errors import Interrupted, RecipeError
from rlpost.recipe.overrides import alternatives

EVALUATION = {
    "data": {"held_out": {"task": {"fn": "addition.held_out"}, "limit": 12}},
    "rewards": [{"fn": "rewards.py:digits"}],
    "sampling": {"max_new_tokens": 4},
    "samples": 2,
}
LEARNING = "stages.sft.learning_rate"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write(tmp_path, {"sft": {**SFT, "steps": 2}}, evaluation=EVALUATION, runs="runs"))


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "sweep", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("a=1", None),
        ("a=[1,2]", None),
        ("a='x, y'", None),
        ("a=~/x", None),
        ("a=1,2", ["1", "2"]),
        ("a=1e-3,1e-4", ["0.001", "0.0001"]),
        ("a=range(1,4)", ["1", "2", "3"]),
        ("a=range(0.1,0.35,0.1)", ["0.1", "0.2", "0.3"]),
        ("a=choice(x,y)", ["x", "y"]),
        ("a=true,null", ["true", "null"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a='x, y',z", ["'x, y'", "z"]),
    ],
)
def test_values_are_written_as_hydra_does(word: str, values: list[str] | None) -> None:
    assert alternatives(word) == ("a", values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "nothing to sweep"),
        ([], "nothing to sweep"),
        (["seed"], "seed: expected key=value"),
        (["seed=1,1"], "1 stands twice"),
        (["seed=1,2", "seed=3,4"], "seed: given twice"),
        (["seed=1", "seed=3,4"], "seed: given twice"),
        (["seed=interval(0,1)"], "cannot be listed"),
        (["seed=range(1,1)"], "no values"),
        (["seed=range(0,100000)"], "more than 1000 values"),
        (["seed=range(0,100)", f"{LEARNING}=1,0.1,0.01,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"], "1100 combinations"),
        (["run=a,b"], "run: a sweep names its runs"),
        (["sed=1,2"], r"sed=1: sed: unknown key - did you mean 'seed'"),
        (["seed=1,x"], "seed=x: seed: expected a whole number"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(recipe: str, words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        sweep.plan(recipe, words)
    assert not Path("runs").exists()


def test_runs_are_named_by_their_values(recipe: str) -> None:
    made = sweep.plan(recipe, ["seed=1,2", f"{LEARNING}=1e-3,0.02", "run=mine"])
    assert [c.path.name for c in made] == [
        f"mine-seed-{seed}-learning_rate-{rate}" for seed in (1, 2) for rate in ("0.001", "0.02")
    ]
    assert [c.resolved.config.seed for c in made] == [1, 1, 2, 2]
    # Keys are as short as tells them apart; what no name can hold is told apart by a digest.
    assert sweep.name_of("r", {"stages.sft.steps": "1", "stages.dpo.steps": "2"}) == "r-sft.steps-1-dpo.steps-2"
    odd = [sweep.name_of("r", {"stages.sft.loss": value}) for value in ("{fn: nll}", "{fn; nll}")]
    assert odd[0] != odd[1]
    assert all(name.startswith("r-loss-_fn_nll_-") for name in odd)
    assert len(sweep.name_of("r", {"vars.text": "x" * 200})) == 80


def test_the_best_comes_first_and_a_finished_run_is_not_run_again(recipe: str, monkeypatch, capsys) -> None:
    words = ("stages.sft.learning_rate=1e-9,3e-2", "--json")
    assert command(monkeypatch, recipe, *words) == 0
    out, err = capsys.readouterr()
    runs = json.loads(out)["runs"]
    values = [run["evaluation"][0]["value"] for run in runs]
    assert values == sorted(values, reverse=True)
    assert {run["values"][LEARNING] for run in runs} == {"1e-09", "0.03"}
    for run in runs:
        scores = [score for score in rlpost.Run(run["run"]).evaluation if score.stage == "sft"]
        assert [score.value for score in scores] == [score["value"] for score in run["evaluation"]]
        assert run["checkpoint"] == str(Path(run["run"]).absolute() / "sft/final")
    lines = err.splitlines()
    heads = next(line for line in lines if line.startswith("run ") and line.endswith("sampled"))
    assert heads.split() == ["run", "learning_rate", "greedy", "sampled"]
    assert lines[lines.index(heads) + 1].startswith(runs[0]["run"])
    assert command(monkeypatch, recipe, words[0]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [run["checkpoint"] for run in runs]
    assert err.count("sft: done already") == 2


def test_one_that_fails_does_not_lose_the_others(recipe: str, monkeypatch, capsys) -> None:
    Path("strict.py").write_text(
        "def strict(completion, *, most: int = 0):\n"
        "    if most:\n        raise ValueError('cannot score')\n    return 1.0\n"
    )
    word = "evaluation.rewards=[{fn: strict.py:strict, args: {most: 1}}],[{fn: strict.py:strict}]"
    assert command(monkeypatch, recipe, word, "--json") == 6
    out, err = capsys.readouterr()
    good, bad = json.loads(out)["runs"]
    assert (good["error"], good["evaluation"][0]["value"]) == (None, 1.0)
    assert (bad["checkpoint"], bad["evaluation"]) == (None, [])
    assert "cannot score" in bad["error"]
    assert "failed: " in err.splitlines()[-1]


def test_a_signal_ends_the_sweep_and_the_same_command_goes_on(recipe: str, monkeypatch, capsys) -> None:
    real, trained = pipeline.train, []

    def train(resolved, allow_change=False):
        trained.append(resolved.config.run)
        if len(trained) == 2:
            raise Interrupted("stopped", 15)
        return real(resolved, allow_change)

    monkeypatch.setattr(pipeline, "train", train)
    assert command(monkeypatch, recipe, "seed=range(1,4)", "evaluation=null") == 143
    assert trained == ["run-seed-1", "run-seed-2"]
    assert command(monkeypatch, recipe, "seed=range(1,4)", "evaluation=null") == 0
    out, err = capsys.readouterr()
    assert [Path(line).parts[-3] for line in out.splitlines()] == ["run-seed-1", "run-seed-2", "run-seed-3"]
    assert "no run has an evaluation" in err


def test_a_wrong_source_is_found_before_the_first_run(recipe: str, monkeypatch, capsys) -> None:
    source = "{problems: {path: nowhere.jsonl}}"
    task = "{problems: {task: {fn: addition.train}}}"
    assert command(monkeypatch, recipe, f"stages.sft.data={task},{source}") != 0
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_dry_run_lists_the_runs(recipe: str, monkeypatch, capsys) -> None:
    assert command(monkeypatch, recipe, "seed=1,2", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == ["runs/run-seed-1: seed=1", "runs/run-seed-2: seed=2"]
    assert not Path("runs").exists()
