"""What the shell offers at TAB, asked as bash and zsh ask."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlpost.cli.app import main
from rlpost.cli.completion import rejoined
from rlpost.cli.keys import Keys, merged

Ask = Callable[..., list[str]]
RECIPE = """\
vars: {rewards: [{fn: math_answer}]}
stages:
  first: {kind: sft, data: {rows: {path: rows.jsonl}}, steps: 7, learning_rate: 1e-3}
  second: {kind: grpo, steps: 3, rewards: [{fn: ends}, {fn: length, args: {target: 9}}], data: "${vars.data}"}
"""


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Ask:
    """`ask("train", "gr")`: what bash is offered for the last word, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_RLPOST_COMPLETE", "complete_bash")

    def asked(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["rlpost"])
        monkeypatch.setenv("COMP_WORDS", "\n".join(["rlpost", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        assert (stop.value.code, err) == (0, "")
        return out.split()

    return asked


@pytest.mark.parametrize(
    ("words", "whole"),
    [
        (["r", "train", "demo", ""], ["r", "train", "demo", ""]),
        (["r", "seed", "=", "1", "k", "="], ["r", "seed=1", "k=", ""]),
        (["r", "k", "=", "", "more"], ["r", "k=", "more"]),
        (["r", "fn", "=", "a.py", ":", "f"], ["r", "fn=a.py:", "f"]),
        (["r", "a", ":=", "b"], ["r", "a:=", "b"]),
        (["r", "--recipe", "=", "de"], ["r", "--recipe", "de"]),
        (["r", "--recipe", "=", "demo", "x"], ["r", "--recipe=demo", "x"]),
        (["r", "key=val"], ["r", "key=val"]),
    ],
)
def test_what_bash_took_apart_is_put_together(words: list[str], whole: list[str]) -> None:
    assert rejoined(words) == whole


def test_commands_and_options(ask: Ask) -> None:
    assert ask("tr") == ["train"]
    assert ask("train", "demo", "--dry") == ["--dry-run"]
    assert ask("goals", "plot", "") == ["maze"]


def test_recipes_that_may_be_run(ask: Ask) -> None:
    assert ask("train", "grpo_m") == ["grpo_math"]
    everything = ask("train", "")
    assert "demo" in everything
    assert "methods/" in everything
    methods = ask("train", "met")
    assert "methods/rloo" in methods
    assert not {"methods/common", "methods/on_pairs", "methods/on_policy"} & set(methods)
    assert ask("eval", "--recipe", "=", "demo_") == ["demo_ppo"]
    assert ask("copy", "methods/rl") == ["methods/rloo"]
    assert ask("train", "no_such") == []


def test_recipes_in_files(ask: Ask) -> None:
    Path("mine.yaml").write_text(RECIPE)
    Path("a name.yaml").write_text(RECIPE)  # a shell would take it for two words
    Path("sub/deep").mkdir(parents=True)
    Path("sub/deep/one.yml").write_text(RECIPE)
    Path("sub/deep/rows.jsonl").write_text("")
    assert "mine.yaml" in ask("train", "")
    assert "a" not in ask("train", "")
    assert ask("train", "mi") == ["mine.yaml"]
    assert ask("train", "su") == ["sub/deep/one.yml"]
    assert ask("train", "./mi") == ["./mine.yaml"]


def test_runs_stages_and_other_folders(ask: Ask) -> None:
    assert ask("eval", "") == []
    for name in ("one", "other"):
        Path(f"runs/{name}/sft/final").mkdir(parents=True)
        Path(f"runs/{name}/sft/DONE").write_text("")
        Path(f"runs/{name}/sft/rollouts").mkdir()
        Path(f"runs/{name}/evaluation").mkdir()
        Path(f"runs/{name}/config.resolved.yaml").write_text(RECIPE)
    assert ask("eval", "") == ["runs/one", "runs/other"]
    assert ask("sample", "runs/on") == ["runs/one", "runs/one/sft"]
    Path("runs/one/sft/final/checkpoint.json").write_text("{}")
    assert ask("goals", "sample", "runs/one", "--network", "runs/one/s") == ["runs/one/sft", "runs/one/sft/final"]
    Path("models/tiny").mkdir(parents=True)
    assert ask("sample", "mod") == ["models/tiny/"]


def test_keys_of_a_recipe_as_bash_takes_them_apart(ask: Ask) -> None:
    Path("mine.yaml").write_text(RECIPE)
    assert {"stages.first.", "stages.second."} <= set(ask("train", "mine.yaml", "stages."))
    steps = "stages.first.steps"
    assert ask("train", "mine.yaml", steps[:-2]) == [f"{steps}=", f"{steps}=7", f"{steps}=null"]
    assert ask("train", "mine.yaml", "seed", "=", "1", steps, "=") == ["7", "null"]
    assert ask("show", "mine.yaml", steps, "=", "8") == []
    assert ask("eval", "--recipe", "mine.yaml", steps, "=", "") == ["7", "null"]
    assert ask("train", "mine.yaml", "stages.second.group") == [f"stages.second.group_size={end}" for end in ("", "8")]
    assert "smollm2" in ask("train", "mine.yaml", "model", "=", "smol")
    assert ask("train", "mine.yaml", "model", "=", "my_") == []
    Path("model").mkdir()
    Path("model/my_own.yaml").write_text("path: some/where\n")
    assert ask("train", "mine.yaml", "model", "=", "my_") == ["my_own"]
    assert "model.path=some/where" in ask("train", "mine.yaml", "model", "=", "my_own", "model.pa")
    assert ask("train", "mine.yaml", "stages.second.rewards.1.args.t") == [
        "stages.second.rewards.1.args.target=",
        "stages.second.rewards.1.args.target=9",
    ]


def test_keys_kinds_and_arguments_that_a_recipe_does_not_have_yet(ask: Ask) -> None:
    Path("mine.yaml").write_text(RECIPE)
    assert "stages.second.advantage." in ask("train", "mine.yaml", "stages.second.")
    assert "stages.first.advantage." not in ask("train", "mine.yaml", "stages.first.")
    assert ask("train", "mine.yaml", "stages.second.rewards.1.args.w") == ["stages.second.rewards.1.args.width="]
    assert "leave_one_out" in ask("train", "mine.yaml", "stages.second.advantage.fn", "=", "l")
    assert "trpo" in ask("train", "mine.yaml", "stages.second.kind", "=", "t")


def test_files_where_a_key_names_one(ask: Ask) -> None:
    Path("mine.yaml").write_text(RECIPE)
    Path("rows/more").mkdir(parents=True)
    Path("rows/a.jsonl").write_text("")
    key = "stages.first.data.rows.path"
    assert ask("train", "mine.yaml", key, "=", "ro") == ["rows.jsonl", "rows/a.jsonl", "rows/more/"]
    assert ask("train", "mine.yaml", key, "=", "rows/a") == ["rows/a.jsonl"]
    assert ask("train", "mine.yaml", "stages.first.schedule", "=", "ro") == []


def test_keys_and_choices_of_packaged_recipes(ask: Ask) -> None:
    assert ask("train", "demo", "stages.grpo.adv") == ["stages.grpo.advantage.fn=", "stages.grpo.advantage.args."]
    assert ask("train", "demo", "stages.grpo.weight", "=", "seq") == ["sequence_mean", "sequence_sum"]
    functions = ask("show", "methods/rloo", "stages.rl.advantage.fn", "=")
    assert {"leave_one_out", "group_normalised"} <= set(functions)
    assert not {"whiten", "ema"} & set(functions)  # helpers beside them
    assert ask("train", "demo", "stages.dpo.loss.args.b") == [
        "stages.dpo.loss.args.beta=",
        "stages.dpo.loss.args.beta=0.1",
    ]
    assert "defaults=" not in ask("train", "demo", "")


def test_keys_of_the_run_that_is_evaluated(ask: Ask) -> None:
    Path("runs/one/first").mkdir(parents=True)
    Path("runs/one/first/DONE").write_text("")
    Path("runs/one/config.resolved.yaml").write_text(RECIPE)
    assert "stages.first." in ask("eval", "runs/one/first", "stages.")
    assert "stages.first." in ask("eval", "stages.")  # of the newest


@pytest.mark.parametrize("text", ["stages: {", "stages: [1]", "a: b: c", "stages: {x: null}", "- 1", "a: *b", "\x00"])
def test_a_broken_recipe_completes_to_nothing(ask: Ask, text: str) -> None:
    Path("broken.yaml").write_text(text)
    assert ask("train", "broken.yaml", "stages.x.") == []
    assert ask("train", "no_such.yaml", "stages.x.") == []
    assert ask("train", "broken.yaml", "stages.x.kind", "=", "g") == []


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "seed": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/reference"}], "description": "Of everything.\nMore."},
        "threads": {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": "Of the CPU. Default: `2`."},
        "model": {"$ref": "#/$defs/Model"},
        "stages": {"additionalProperties": {"anyOf": [{"$ref": "#/$defs/Stage"}, {"$ref": "#/$defs/reference"}]}},
    },
    "$defs": {
        "reference": {"type": "string", "pattern": r"\$\{"},
        "Model": {
            "properties": {
                "path": {"type": "string", "format": "path"},
                "lora": {"anyOf": [{"type": "null"}, {"properties": {}}]},
            }
        },
        "Stage": {
            "allOf": [
                {
                    "if": {"required": ["kind"], "properties": {"kind": {"const": "sft"}}},
                    "then": {"$ref": "#/$defs/Sft"},
                },
                {
                    "if": {"required": ["kind"], "properties": {"kind": {"const": "grpo"}}},
                    "then": {"$ref": "#/$defs/Grpo"},
                },
                {"if": {"not": {"required": ["kind"]}}, "then": {"properties": {"any": {}, "weight": {}}}},
            ]
        },
        "Sft": {"properties": {"kind": {"const": "sft"}, "batch_size": {"type": "integer"}, "enabled": {}}},
        "Grpo": {
            "properties": {
                "kind": {"const": "grpo"},
                "whiten": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/reference"}]},
                "weight": {
                    "enum": ["token_mean", "sequence_mean", "sequence_sum"],
                    "markdownEnumDescriptions": ["Every token counts the same.", "Every completion does.", "A sum."],
                },
                "advantage": {"properties": {"fn": {"anyOf": [{"enum": ["rloo", "grpo"]}, {"type": "string"}]}}},
                "rewards": {"anyOf": [{"type": "array", "items": {"properties": {"fn": {}, "weight": {}}}}]},
                "kl": {"if": {"type": "object"}, "then": {"properties": {"beta": {"type": "number"}}}},
            }
        },
    },
}


@pytest.fixture
def keys() -> Keys:
    stages = {
        "a": {"kind": "grpo", "rewards": [{"fn": "ends"}], "kl": "${vars.kl}"},
        "b": {"kind": "sft"},
        "c": {"steps": 1},
    }
    groups = {"model": ["tiny", "large"]}
    return Keys(SCHEMA, {"stages": stages, "vars": {"kl": {"beta": 0.1}, "flag": True}}, groups)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("se", ["seed="]),
        ("th", ["threads=", "threads=2", "threads=null"]),
        ("stages.b.", ["stages.b.kind=", "stages.b.batch_size=", "stages.b.enabled="]),
        ("stages.a.batch", []),
        ("stages.a.w", ["stages.a.whiten=", "stages.a.weight="]),
        ("stages.a.wh", ["stages.a.whiten=", "stages.a.whiten=true", "stages.a.whiten=false"]),
        ("stages.a.weight=seq", ["stages.a.weight=sequence_mean", "stages.a.weight=sequence_sum"]),
        ("stages.a.adv", ["stages.a.advantage.fn=", "stages.a.advantage.fn=rloo", "stages.a.advantage.fn=grpo"]),
        ("stages.a.rewards.0.w", ["stages.a.rewards.0.weight="]),
        ("stages.a.rewards.0.f", ["stages.a.rewards.0.fn=", "stages.a.rewards.0.fn=ends"]),
        ("stages.a.k", ["stages.a.kind=", "stages.a.kl="]),
        ("vars.f", ["vars.flag=", "vars.flag=true"]),
        ("mod", ["model.", "model="]),
        ("model=", ["model=tiny", "model=large"]),
        ("model=l", ["model=large"]),
        ("nothing", []),
        ("stages.c.an", ["stages.c.any="]),
        ("stages.c.w", ["stages.c.whiten=", "stages.c.weight="]),
        ("stages.d.", []),
    ],
)
def test_keys_and_choices_under_a_schema(keys: Keys, word: str, expected: list[str]) -> None:
    assert [name for name, _ in keys.candidates(word)] == expected


def test_keys_that_name_files(keys: Keys) -> None:
    assert [keys.takes_path(key) for key in ("model.path", "seed", "no.such")] == [True, False, False]


def test_what_a_key_means_is_said(keys: Keys) -> None:
    assert keys.candidates("see") == [("seed=", "Of everything.")]
    assert ("stages.a.weight=sequence_mean", "Every completion does.") in keys.candidates("stages.a.weight=")


def test_files_that_inherit() -> None:
    below, above = {"a": {"b": 1, "c": [1]}}, {"a": {"c": [2], "d": "${a.b}"}}
    assert merged([(below, None), (above, None)]) == {"a": {"b": 1, "c": [2], "d": "${a.b}"}}
    assert merged([(below, None), ({"a": {"e": 5}}, "a")]) == {"a": {"e": 5}}
    assert below == {"a": {"b": 1, "c": [1]}}


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment whose `rlpost` answers to completion, and otherwise prints its arguments."""
    script = tmp_path / "bin/rlpost"
    script.parent.mkdir()
    run = f'exec {sys.executable} -m rlpost "$@"'
    script.write_text(f'#!/bin/sh\n[ -n "$_RLPOST_COMPLETE" ] && {run}\nprintf "<%s>" "$@"; echo\n')
    script.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "TERM": "dumb",
        "INPUTRC": "/dev/null",
    }


def typed_into_bash(lines: list[str], environment: dict[str, str], folder: Path) -> list[str]:
    """What `rlpost` was called with, line by line, where a person types these into a terminal."""
    ours, theirs = pty.openpty()
    bash = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder
    )
    os.close(theirs)
    start = 'eval "$(_RLPOST_COMPLETE=source_bash rlpost)"'
    os.write(ours, "".join(f"{line}\n" for line in [start, *lines, "exit"]).encode())
    said = b""
    try:
        while piece := os.read(ours, 65536):
            said += piece
    except OSError:
        pass  # the terminal is gone with bash
    os.close(ours)
    assert bash.wait() == 0
    return re.findall(r"(?m)^((?:<[^<>\r\n]*>)+)\r?$", said.decode())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_in_bash_itself(program: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    lines = ["rlpost train mine.yaml stages.first.steps=n\t", "rlpost train mine.yaml stages.first.ste\tX"]
    assert typed_into_bash(lines, program, tmp_path) == [
        "<train><mine.yaml><stages.first.steps=null>",
        "<train><mine.yaml><stages.first.steps=X>",  # no space after the sign
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_whole_line_in_bash(program: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(RECIPE)
    lines = [
        "rlpost tr\tgrpo_m\t",
        "rlpost train meth\trlo\t",
        "rlpost train mi\tstages.fi\tste\t5",
        "rlpost eval --recipe=demo_\t",
        "rlpost train demo stages.grpo.adv\tfn=leave\tseed=1",
        "rlpost train demo seed=1 stages.grpo.weight=seq\tm\tstages.grpo.kl.pl\tl\t",
        "rlpost show demo model.lora.\tx",
    ]
    assert typed_into_bash(lines, program, tmp_path) == [
        "<train><grpo_math>",
        "<train><methods/rloo>",
        "<train><mine.yaml><stages.first.steps=5>",
        "<eval><--recipe=demo_ppo>",
        "<train><demo><stages.grpo.advantage.fn=leave_one_out><seed=1>",
        "<train><demo><seed=1><stages.grpo.weight=sequence_mean><stages.grpo.kl.placement=loss>",
        "<show><demo><model.lora.x>",
    ]


def test_as_zsh_asks(program: dict[str, str], tmp_path: Path) -> None:
    """Its protocol, as a process: zsh evaluates what is printed."""
    (tmp_path / "mine.yaml").write_text(RECIPE)
    asked = {**program, "_RLPOST_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "rlpost train mine.yaml stages.f"}
    done = subprocess.run(["rlpost"], env=asked, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("_arguments '*: :((\"stages.first.")
    assert '"stages.first.steps="' in done.stdout
    # Evaluated as zsh does: one word for each argument, whatever stands in descriptions.
    asked["_TYPER_COMPLETE_ARGS"] = "rlpost train "
    printed = subprocess.run(["rlpost"], env=asked, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    shell = f'_arguments() {{ printf \'<%s>\' "$#" "$1"; }}; {printed}'
    said = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert said.startswith("<1><*: :((")
    assert '"demo":"A tiny model from nothing through SFT' in said
