"""The command line with the heavy half replaced: what is parsed, printed and returned."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlpost.cli.app import main
from rlpost.cli.as_text import coloured
from rlpost.errors import DataError, DiskError, Interrupted, RecipeError, RunInUseError

RECIPE = """\
model: {path: gpt2}
stages:
  sft: {kind: sft, data: {a: {path: rows.jsonl}}, steps: 1, learning_rate: 1e-3}
"""


class Heavy:
    """Stands in for the modules that the commands call, and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.result: Any = None
        self.error: BaseException | None = None

    def processes_of(self, *_: Any) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if self.error:
                raise self.error
            return self.result

        return call


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Heavy:
    stand_in = Heavy()
    for name in ("pipeline", "inference.evaluate", "inference.sample", "inference.pairs", "goals.sample", "cli.shown"):
        package, _, module = f"rlpost.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, f"{package}.{module}", stand_in)  # type: ignore[arg-type]
        monkeypatch.setattr(importlib.import_module(package), module, stand_in, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return stand_in


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    "words",
    [
        ["r.yaml", "stages.sft.steps=7", "seed=3", "--allow-change"],
        ["--allow-change", "r.yaml", "stages.sft.steps=7", "seed=3"],
        ["r.yaml", "stages.sft.steps=7", "--allow-change", "seed=3"],
    ],
)
def test_train_prints_the_last_checkpoint_alone(heavy: Heavy, monkeypatch, capsys, words: list[str]) -> None:
    heavy.result = Path("runs/r/sft/final")
    assert run(monkeypatch, "train", *words) == 0
    (name, (resolved, allow_change), _), *rest = heavy.calls
    assert (name, allow_change, rest) == ("train", True, [])
    assert (resolved.config.stages["sft"].steps, resolved.config.seed) == (7, 3)
    assert resolved.overrides == ("stages.sft.steps=7", "seed=3")
    assert capsys.readouterr().out == "runs/r/sft/final\n"


def test_train_json_and_dry_run(heavy: Heavy, monkeypatch, capsys) -> None:
    heavy.result = Path("runs/r/sft/final")
    assert run(monkeypatch, "train", "r.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"checkpoint": "runs/r/sft/final", "run": "runs/r"}
    heavy.result = ["from gpt2", "sft: 1 step"]
    assert run(monkeypatch, "train", "r.yaml", "--dry-run") == 0
    assert heavy.calls[-1][0] == "dry_run"
    assert capsys.readouterr().out == "from gpt2\nsft: 1 step\n"


def test_train_cut_to_a_few_steps(heavy: Heavy, monkeypatch, capsys) -> None:
    heavy.result = Path("runs/r-2-steps/sft/final")
    assert run(monkeypatch, "train", "r.yaml", "stages.sft.steps=7", "--steps", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["run"] == "runs/r-2-steps"
    ((_, (resolved, _), _),) = heavy.calls
    assert resolved.config.stages["sft"].steps == 2
    assert run(monkeypatch, "train", "r.yaml", "--steps", "0") == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("stages.x: wrong"), 2),
        (DataError("rows.jsonl:3: not JSON"), 3),
        (DiskError("no space left"), 5),
        (RunInUseError("in use"), 7),
        (Interrupted("stopped after a checkpoint", 15), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_on_stderr_and_an_exit_code(heavy, monkeypatch, capsys, error, code: int) -> None:
    heavy.error = error
    assert run(monkeypatch, "train", "r.yaml") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("" if code == 130 else f"rlpost: {error}\n")


def test_a_message_cannot_write_control_characters_or_a_second_line(heavy: Heavy, monkeypatch, capsys) -> None:
    heavy.error = DataError("row \x1b[31mred\x1b[0m\nsecond\tline")
    assert run(monkeypatch, "train", "r.yaml") == 3
    assert capsys.readouterr().err == "rlpost: row red second line\n"


def test_a_wrong_recipe_never_reaches_the_heavy_half(heavy: Heavy, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "train", "r.yaml", "stages.sft.stesp=7") == 2
    assert heavy.calls == []
    assert capsys.readouterr().err == ("rlpost: stages.sft.stesp: unknown key - did you mean 'stages.sft.steps'?\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, None, [])),
        (["runs/r"], ("runs/r", None, [])),
        (["evaluation.samples=4", "seed=1"], (None, None, ["evaluation.samples=4", "seed=1"])),
        (["runs/r", "seed=1", "--recipe", "demo"], ("runs/r", "demo", ["seed=1"])),
    ],
)
def test_eval_tells_checkpoints_from_settings(heavy, monkeypatch, capsys, words, expected) -> None:
    summary = {"accuracy": 0.5, "interval": [0.25, 0.75], "test": {"greedy": 1 / 3}}
    heavy.result = ["2+2="], SimpleNamespace(to_json=lambda: summary), "runs/r/sft/final"
    assert run(monkeypatch, "eval", *words) == 0
    assert heavy.calls == [("evaluate_checkpoint", expected, {})]
    assert capsys.readouterr().out == (
        "checkpoint: runs/r/sft/final\naccuracy: 0.5\ninterval: [0.25, 0.75]\ntest.greedy: 0.333333\n"
    )


def test_eval_prints_json_a_sample_and_then_the_summary(heavy: Heavy, monkeypatch, capsys) -> None:
    result = SimpleNamespace(to_json=lambda: {"accuracy": 1.0})
    monkeypatch.setattr(heavy, "evaluate_checkpoint", lambda *_: (["2+2="], result, "m"), raising=False)
    heavy.result = [{"prompt": "2+2=", "text": "4"}]
    assert run(monkeypatch, "eval", "m", "--json") == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"prompt": "2+2=", "text": "4"},
        {"checkpoint": "m", "summary": {"accuracy": 1.0}},
    ]


def test_sample_passes_its_options_on(heavy: Heavy, monkeypatch, capsys) -> None:
    heavy.result = ["4", "5"]
    words = ["m", "2+2=", "-n", "2", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--top-k", "3"]
    assert run(monkeypatch, "sample", *words) == 0
    assert capsys.readouterr().out == "4\n5\n"
    ((name, args, options),) = heavy.calls
    assert (name, args) == ("sample", ("m", "2+2="))
    sampling = options["sampling"]
    assert (sampling.temperature, sampling.top_k, sampling.stop) == (0.5, 3, ["a", "b"])
    assert (options["n"], options["best_of"], options["recipe"], options["engine"]) == (2, None, None, None)
    assert run(monkeypatch, "sample", "m", "x", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"prompt": "x", "completion": "4"}


@pytest.mark.parametrize(("option", "avoid"), [("--goal", False), ("--avoid", True)])
def test_goals_sample_passes_its_options_on(heavy: Heavy, monkeypatch, capsys, option: str, avoid: bool) -> None:
    heavy.result = ["4"]
    words = ["m", "2+2=", "--network", "v", option, "a", option, "b", "--candidates", "0", "--greedy", "--seed", "3"]
    assert run(monkeypatch, "goals", "sample", *words) == 0
    assert capsys.readouterr().out == "4\n"
    ((name, args, options),) = heavy.calls
    assert (name, args) == ("guided_sample", ("m", "2+2=", "v", ["a", "b"]))
    sampling = options.pop("sampling")
    assert (sampling.max_new_tokens, sampling.temperature) == (256, 0)  # the likeliest token
    assert options == {"avoid": avoid, "candidates": 0, "n": 1, "seed": 3}


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "m", "x", "--temperature", "0"],
        ["sample", "m", "x", "--top-p", "2"],
        ["sample", "m", "x", "--best-of", "4"],
        ["sample", "m", "x", "--best-of", "4", "--recipe", "r.yaml", "--judge", "r"],
        ["sample", "m", "x", "--judge", "r"],
        ["pairs", "m", "--recipe", "r.yaml"],
        ["train"],
        ["trian", "r.yaml"],
        ["train", "r.yaml", "--nonsense"],
    ],
)
def test_a_misused_command_exits_2_and_does_nothing(heavy, monkeypatch, capsys, words: list[str]) -> None:
    assert run(monkeypatch, *words) == 2
    assert heavy.calls == []
    assert capsys.readouterr().out == ""


def test_pairs_names_its_file(heavy: Heavy, monkeypatch, capsys) -> None:
    heavy.result = Path("p.jsonl")
    assert run(monkeypatch, "pairs", "m", "seed=1", "--recipe", "r.yaml", "--out", "p.jsonl") == 0
    assert heavy.calls == [("write_pairs", ("m", "r.yaml", "p.jsonl", ["seed=1"]), {})]
    assert capsys.readouterr().out == "p.jsonl\n"


def test_show_prints_a_recipe_that_resolves_to_itself(heavy: Heavy, monkeypatch, capsys) -> None:
    assert run(monkeypatch, "show", "r.yaml", "stages.sft.steps=9") == 0
    first = capsys.readouterr().out
    assert "\x1b" not in first
    assert "    steps: 9\n" in first
    Path("again.yaml").write_text(first)
    heavy.result = ["a row"]
    assert run(monkeypatch, "show", "again.yaml", "--rows", "2") == 0
    assert capsys.readouterr().out == f"{first}a row\n"
    assert [(name, args[1]) for name, args, _ in heavy.calls] == [("show_rows", 2)]


def test_keys_are_coloured_for_a_terminal_only() -> None:
    assert coloured("a:\n- b: c:d\n") == "\x1b[36ma\x1b[0m:\n- \x1b[36mb\x1b[0m: c:d\n"


def test_list_shows_recipes_and_runs(heavy: Heavy, monkeypatch, capsys) -> None:
    layout = ModuleType("rlpost.run.layout")
    found = [SimpleNamespace(path=Path("runs/r"), stages={"sft": "done", "dpo": ""})]
    layout.list_runs = lambda _: found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlpost.run.layout", layout)
    assert run(monkeypatch, "list") == 0
    assert capsys.readouterr().out.endswith("runs in runs/:\n  runs/r  sft done, dpo\n")
    assert run(monkeypatch, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"] == {"runs/r": "sft done, dpo"}


def test_the_front_door_is_light() -> None:
    """Counted in modules, which are the same on a busy machine."""
    code = (
        "import sys; sys.argv = ['rlpost', '--help']\n"
        "from rlpost.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'transformers', 'hydra', 'omegaconf', 'rich', 'numpy') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 300, len(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train" in done.stdout


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlpost", "show", "no_such"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("rlpost: no_such: no packaged recipe of that name")
    assert done.stderr.count("\n") == 1


def test_a_recipe_is_shown_while_values_are_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE.replace("rows.jsonl", "'???'").replace("{path: gpt2}", "{path: '???'}"))
    assert run(monkeypatch, "show", "r.yaml") == 0
    out, err = capsys.readouterr()
    assert out.count("path: ???") == 2
    assert err == "warning: still to be given: model.path, stages.sft.data.a.path\n"
    assert run(monkeypatch, "show", "r.yaml", "--rows", "1") == 2
    assert "model.path: missing - give it" in capsys.readouterr().err
