"""The tool `python`: what a model reads of its program, and that the program is held."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlpost.errors import RecipeError
from rlpost.sandbox.levels import why_not
from rlpost.sandbox.outcome import Level
from rlpost.tools.python import SILENT, python, ready

SAID = {
    "print(sum(range(101)))": "5050",
    "x = 1": SILENT,
    "print('é', end='')\nraise SystemExit(0)": "é",
    "print('before')\nprint(1 / 0)": "before\nZeroDivisionError: division by zero",
    "print(1": "SyntaxError: '(' was never closed",
    "import sys\nsys.exit('no such thing')": "no such thing",
    "raise SystemExit(3)": "Error: the program ended with exit code 3",
    "raise ValueError('x' * 1000)": f"ValueError: {'x' * 288}",
    "import ctypes\nctypes.string_at(0)": "Error: the program was ended by signal 11",
    "held = [bytearray(1 << 20) for _ in range(4000)]": "MemoryError",
    "print('x' * 2500)": f"{'x' * 2000}… (cut after 2000 characters)",
    "while True: print('x' * 10000)": f"{'x' * 2000}… (cut after 2000 characters)\nError: the program printed too much",
    "import numpy": "ModuleNotFoundError: No module named 'numpy'",
}


def test_what_a_program_prints_and_the_last_line_of_its_error_are_returned():
    with ThreadPoolExecutor(2) as pool:
        assert dict(zip(SAID, pool.map(python, SAID), strict=True)) == SAID
    assert python("print('abcdef')", longest=3) == "abc… (cut after 3 characters)"


@pytest.mark.parametrize("level", [Level.namespaces, Level.landlock])
def test_a_program_reads_no_files_and_reaches_no_network(tmp_path: Path, level: Level):
    """Without a sandbox it does both."""
    (tmp_path / "secret").write_text("not for programs")
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempts = (
            f"print(open('{tmp_path}/secret').read())",
            f"import socket\nprint(socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5).fileno() > 2)",
        )
        with ThreadPoolExecutor(2) as pool:
            held = list(pool.map(lambda program: python(program, level=level), attempts))
            naked = list(pool.map(lambda program: python(program, level=Level.rlimits), attempts))
    assert all(last.startswith(("FileNotFoundError", "PermissionError")) for last in held), held
    assert naked == ["not for programs", "True"]


def test_a_program_does_not_outlast_its_time():
    """What it printed plays no part: how far it came depends on how busy the machine is."""
    waits, computes = "import time\nprint('begun', flush=True)\ntime.sleep(60)", "while True: pass"
    told = "Error: the program took longer than 1 s of computing or {} s in all"
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(python, waits, deadline=0.3)
        computing = pool.submit(python, computes, deadline=0.9)
    assert (waiting.result(), computing.result()) == (told.format("0.6"), told.format("1.8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deadline": 0}, "python: sandbox: deadline is 0; give seconds a run, more than 0, at most 3600"),
        ({"memory": 8}, "python: sandbox: memory is 8 MiB; Python needs at least 64 to start"),
        ({"level": "landlocks"}, "python: sandbox: no level 'landlocks' - did you mean 'landlock'?"),
        ({"longest": 0}, "python.longest: 0 leaves nothing of what a program prints; give 1 or more"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(RecipeError) as caught:
        python("", **arguments)
    assert str(caught.value) == message


def test_the_weakest_level_is_never_taken_unasked(monkeypatch: pytest.MonkeyPatch):
    """A recipe is refused when its functions are bound, before anything is trained."""
    monkeypatch.setattr("rlpost.sandbox.levels.why_not", lambda level: "" if level is Level.rlimits else "gone")
    with pytest.raises(RecipeError, match=r"^stages.grpo.tools\[0\].args: sandbox: none holds on this machine"):
        ready({}, "stages.grpo.tools[0].args", Path())
    monkeypatch.undo()
    assert why_not(Level.rlimits) == ""
    assert python("print(1)", level="rlimits") == "1"


def test_a_model_is_told_of_the_program_and_what_it_may_do():
    from transformers.utils import get_json_schema

    told = get_json_schema(python)["function"]
    assert told["name"] == "python"
    assert told["parameters"]["required"] == ["code"]
    assert "no files and no network" in told["parameters"]["properties"]["code"]["description"]
