"""`rlpost goals infill`: what is parsed and printed, with the models replaced."""

from __future__ import annotations

import json
import sys

import pytest

from rlpost.cli.app import main
from rlpost.goals import infill_text
from rlpost.goals.infill import Middle

FOUND = [("5+", Middle((9, 14), -1.0, -2.0)), ("", Middle((), -2.0, -2.5)), ("7", Middle((11,), -3.0, -3.0))]


@pytest.fixture
def calls(monkeypatch):
    made = []

    def infill(*args, **kwargs):
        made.append((args, kwargs))
        return FOUND, 64

    monkeypatch.setattr(infill_text, "infill_text", infill)
    return made


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "goals", "infill", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_middles_go_to_stdout_and_the_table_to_stderr(calls, monkeypatch, capsys):
    words = ["f", "r", "1+", "=3", "-n", "8", "--max-new-tokens", "4", "--temperature", "0.5", "--seed", "7"]
    assert run(monkeypatch, *words, "--top", "2", "--no-begin") == 0
    ((args, kwargs),) = calls
    assert args == ("f", "r", "1+", "=3")
    sampling = kwargs.pop("sampling")
    assert (sampling.max_new_tokens, sampling.temperature) == (4, 0.5)
    assert kwargs == {"n": 8, "seed": 7, "begin": False}
    printed = capsys.readouterr()
    assert printed.out == "5+\n\n"
    assert "3 middles ranked, 64 tokens sampled" in printed.err
    assert [line.split() for line in printed.err.splitlines() if "-1.000" in line] == [
        ["5+", "-1.000", "-2.000", "-3.000"]
    ]
    assert "-6.000" not in printed.err


def test_as_json(calls, monkeypatch, capsys):
    assert run(monkeypatch, "f", "r", "1+", "=3", "--json") == 0
    assert calls[0][1]["begin"] is True
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"middle": text, "forward": m.forward, "reverse": m.reverse} for text, m in FOUND
    ]


def test_a_temperature_that_cannot_be(calls, monkeypatch, capsys):
    assert run(monkeypatch, "f", "r", "1+", "=3", "--temperature", "-1") == 2
    assert calls == []
    assert "--temperature" in capsys.readouterr().err
