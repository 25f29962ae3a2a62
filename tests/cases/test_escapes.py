"""What models, rows, files and recipes bring may hold escape sequences: none reaches a terminal."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_world import save_model, save_recipe, save_rows

from rlpost import console
from rlpost.cli.app import main
from rlpost.goals import infill_text
from rlpost.inference import sample
from rlpost.results import emit

# A title, a colour, a cursor movement, C1 forms, a bell, a backspace, a mark that turns the writing around.
EVIL = "ev\x1b]0;owned\x07il\x1b[2J\x1b[31m\x9b5A\x08\x07\u202e!"
SHOWN = "evil!"
FORBIDDEN = ("\x1b]", "\x1b[2J", "\x1b[31m", "\x9b", "\x07", "\x08", "\u202e", "owned")


def on_terminal(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal is sent, on stdout and stderr, by `rlpost WORDS` in this process."""
    master, slave = pty.openpty()
    streams = {name: os.fdopen(os.dup(slave), "w", encoding="utf-8") for name in ("stdout", "stderr")}
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["rlpost", *words])
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit):
        main()
    for stream in streams.values():
        stream.close()
    os.close(slave)
    os.set_blocking(master, False)
    sent = b""
    try:
        while piece := os.read(master, 65536):
            sent += piece
    except OSError:  # the other end is closed: that was all
        pass
    os.close(master)
    return sent.decode("utf-8", "replace")


def returns(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


@pytest.fixture
def evil(here: Path) -> Path:
    save_model(here / "m")
    save_rows(here / f"{EVIL}.jsonl".replace("/", ""), [{"prompt": EVIL, "completion": EVIL}] * 2)
    sft = {"kind": "sft", "data": {EVIL: {"path": f"{EVIL}.jsonl"}}, "steps": 1, "learning_rate": 1e-3}
    recipe = {"description": EVIL, "vars": {EVIL: EVIL}, "model": {"path": "m"}, "stages": {"s": sft}}
    save_recipe(here / "r.yaml", recipe)
    return here


def clean_and_there(sent: str, times: int = 1) -> None:
    assert [sign for sign in FORBIDDEN if sign in sent] == [], repr(sent)
    assert sent.count(SHOWN) >= times, repr(sent)


def test_what_a_model_writes(evil: Path, monkeypatch, capsys, tally) -> None:
    monkeypatch.setattr(sample, "sample", returns([EVIL, EVIL]))
    clean_and_there(on_terminal(["sample", "m", "x", "-n", "2"], monkeypatch), 2)
    raw = on_terminal(["sample", "m", EVIL, "--json"], monkeypatch).splitlines()[0]
    assert json.loads(raw) == {"prompt": EVIL, "completion": EVIL}
    middle = type("Middle", (), {"forward": 0.0, "reverse": 0.0, "score": 0.0})
    monkeypatch.setattr(infill_text, "infill_text", returns(([(EVIL, middle)], 3)))
    clean_and_there(on_terminal(["goals", "infill", "m", "m", "a", "b"], monkeypatch), 2)
    tally("escape sequences on a terminal", right=5)


def test_what_a_model_writes_into_a_pipe_is_what_it_wrote(evil: Path, monkeypatch, capsys, tally) -> None:
    monkeypatch.setattr(sample, "sample", returns([EVIL]))
    monkeypatch.setattr(sys, "argv", ["rlpost", "sample", "m", "x"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == f"{EVIL}\n"
    tally("escape sequences on a terminal", right=1)


@pytest.mark.parametrize(
    "words",
    [["show", "r.yaml"], ["show", "r.yaml", "--rows", "2"], ["train", "r.yaml", "--dry-run"]],
    ids=" ".join,
)
def test_recipes_rows_and_names_of_files(words: list[str], evil: Path, monkeypatch, tally) -> None:
    sent = on_terminal(words, monkeypatch)
    # YAML spells most of them out, `\e` and `\a`: what is left must not move a cursor.
    assert [sign for sign in FORBIDDEN[:-1] if sign in sent] == [], repr(sent)
    tally("escape sequences on a terminal", right=1)


@pytest.mark.parametrize(
    "words",
    [
        ["show", EVIL],
        ["show", f"{EVIL}.yaml"],
        ["train", "r.yaml", f"stages.s.{EVIL}=1"],
        ["train", "r.yaml", f"seed={EVIL}"],
        ["train", "r.yaml", f"stages.s.data.c.path={EVIL}"],
        ["sample", f"./{EVIL}", "x"],
        ["sample", "m", "x", "--temperature", EVIL],
        ["sample", "m", "x", f"--{EVIL}"],
        [EVIL],
        ["goals", "plot", "maze", EVIL],
        ["list", "--runs", EVIL],
        ["list", EVIL],
    ],
    ids=repr,
)
def test_errors_that_repeat_what_was_given(words: list[str], evil: Path, monkeypatch, tally) -> None:
    sent = on_terminal(words, monkeypatch)
    body = sent.replace("\x1b[31mrlpost:", "rlpost:").replace("\x1b[0m", "")  # our own colour
    # Left out, or spelt out (`\\x1b`), as names in quotes are.
    assert [sign for sign in FORBIDDEN[:-1] if sign in body] == [], repr(body)
    assert body.count("rlpost:") == 1
    tally("escape sequences on a terminal", refused=1)


def test_runs_and_their_stages(evil: Path, monkeypatch, tally) -> None:
    run = evil / "runs" / EVIL
    run.mkdir(parents=True)
    (run / "config.resolved.yaml").write_text("description: x\nstages: {s: {kind: sft}}\n")
    clean_and_there(on_terminal(["list"], monkeypatch))
    tally("escape sequences on a terminal", right=1)


def test_messages_and_tables(evil: Path, monkeypatch, tally) -> None:
    def speaks(*_: object) -> list[str]:
        for say in (console.say, console.warn, console.fail):
            say(EVIL)
        console.table(EVIL, [EVIL], [[EVIL]])
        console.samples(EVIL, [(EVIL, EVIL, EVIL)])
        with console.Progress(EVIL, 1) as progress:
            progress.advance({EVIL: 1.0})
        emit("done")
        return []

    monkeypatch.setattr("rlpost.pipeline.dry_run", speaks)
    sent = on_terminal(["train", "r.yaml", "--dry-run"], monkeypatch)
    body = sent.replace("\x1b[31merror", "error")
    assert [sign for sign in FORBIDDEN if sign in body and sign not in ("\x1b[31m",)] == [], repr(body)
    assert body.count(SHOWN) >= 9
    tally("escape sequences on a terminal", right=9)
