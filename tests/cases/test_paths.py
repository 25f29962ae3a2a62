"""`~`, and paths too long or not there: one rule for every path in a recipe and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_world import rlpost, save_model, save_recipe, save_rows

from rlpost.recipe.resolve import resolve

LONG = "x" * 300


@pytest.fixture
def home(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model, rows and a reward, beside the working directory."""
    folder = here / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    save_model(folder / "m")
    save_rows(folder / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    (folder / "my.py").write_text("def one(completion): return 1.0\n")
    (folder / "t.jinja").write_text("{{ messages[0].content }}")
    (folder / "goals.txt").write_text("b\n")
    work = here / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return folder


def sft(**more: Any) -> dict[str, Any]:
    return {
        "kind": "sft",
        "data": {"c": {"path": "~/d.jsonl"}},
        "steps": 1,
        "batch_size": 2,
        "learning_rate": 1e-3,
        **more,
    }


def test_runs_in_the_home_folder_are_there(home: Path, tally) -> None:
    save_recipe(
        Path("r.yaml"), {"runs": "~/out", "model": {"path": "~/m", "precision": "float32"}, "stages": {"s": sft()}}
    )
    ran = rlpost("train", "r.yaml")
    assert ran.code == 0, ran.err
    assert (home / "out/r/s/DONE").exists()
    assert sorted(p.name for p in Path().iterdir()) == ["r.yaml"]
    assert ran.out.strip() == str(home / "out/r/s/final")
    listed = rlpost("list", "--runs", "~/out")
    assert "s done" in listed.out
    for model in ("~/m", "~/out/r", "~/out/r/s"):
        assert rlpost("sample", model, "a", "--max-new-tokens", "2").code == 0
    tally("paths: ~", right=5)


def test_every_path_of_a_recipe_may_begin_with_the_home_folder(home: Path, tally) -> None:
    goals = {"path": "~/goals.txt"}
    data = {"c": {"path": "~/d.jsonl"}}
    value = {"kind": "value", "data": data, "steps": 1, "learning_rate": 1e-3, "goals": goals}
    reward = {"fn": "~/my.py:one"}
    grpo = {"kind": "grpo", "data": value["data"], "steps": 1, "learning_rate": 1e-3, "rewards": [reward]}
    guided = {"kind": "guided", "data": value["data"], "network": "~/v", "goals": goals}
    model = {"path": "~/m", "chat_template": "~/t.jinja"}
    stages = {"v": value, "g": grpo, "i": guided, "s": sft(teacher="~/m", loss={"fn": "forward_kl"})}
    evaluation = {
        "data": value["data"],
        "rewards": [reward, {"fn": "reward_model", "model": "~/judge"}],
        "judge": "~/j",
        "samples": 2,
    }
    save_recipe(
        Path("r.yaml"), {"runs": "~/o", "folder": "~", "model": model, "stages": stages, "evaluation": evaluation}
    )
    text = resolve("r.yaml").to_yaml()
    assert "~" not in text
    assert text.count(str(home)) >= 14
    tally("paths: ~", right=14)


@pytest.mark.parametrize("key", ["runs", "model.path", "stages.s.data.c.path", "model.chat_template", "folder"])
def test_nobodys_home_folder_is_refused(key: str, home: Path, tally) -> None:
    save_recipe(Path("r.yaml"), {"model": {"path": "~/m"}, "stages": {"s": sft()}})
    assert rlpost("show", "r.yaml", f"{key}=~nobody-of-that-name/x").refused(2, f"{key}: ~nobody-of-that-name")
    tally("paths: ~", refused=1)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["show", f"{LONG}.yaml"], 2),
        (["train", "r.yaml", f"model.path={LONG}/m"], 2),
        (["train", "r.yaml", f"stages.s.data.c.path={LONG}.jsonl"], 2),
        (["train", "r.yaml", f"model.chat_template={LONG}"], 2),
        (["train", "r.yaml", f"stages.s.loss.fn={LONG}.py:f"], 2),
        (["train", "r.yaml", f"runs={LONG}"], 5),
        (["train", "r.yaml", "run=" + "a" * 81], 2),
        (["sample", f"{LONG}/m", "x"], 5),
        (["list", "--runs", LONG], 5),
        (["eval", LONG], 5),
        (["goals", "plot", "maze", LONG], 5),
        (["pairs", "m", "--recipe", "r.yaml", "--out", f"{LONG}.jsonl"], 5),
    ],
)
def test_a_path_that_is_too_long_is_one_line(words: list[str], code: int, home: Path, tally) -> None:
    save_recipe(Path("r.yaml"), {"model": {"path": "~/m"}, "stages": {"s": sft()}})
    ran = rlpost(*words)
    assert ran.refused(code), ran.err
    assert "unexpected" not in ran.err
    tally("paths: too long", refused=1)


@pytest.mark.parametrize("out", ["no/folder/p.jsonl", ".", "", "r.yaml/p.jsonl"])
def test_a_result_that_could_not_be_written_is_refused_before_the_work(out: str, home: Path, tally) -> None:
    save_recipe(Path("r.yaml"), {"model": {"path": "~/m"}, "stages": {"s": sft()}})
    assert rlpost("pairs", "no_model", "--recipe", "r.yaml", "--out", out).refused(5, "--out:")
    assert rlpost("goals", "plot", "maze", "no_run", "--out", out).refused(5, "--out:")
    tally("paths: nowhere to write", refused=2)
