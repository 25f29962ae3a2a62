"""The list of changed lines fits the package, and its reader says where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mutants import SHARES, VERIFIED, Mutant, Outcome, misplaced, mutated, read, report

LINE = Mutant(VERIFIED, "one.py", "return a < b", "return a <= b", ("test_one.py",))


@pytest.mark.slow
def test_every_line_is_where_the_list_says_and_nowhere_else():
    assert misplaced(read()) == []


def test_the_list_is_long_and_covers_its_areas():
    mutants = read()
    assert len(mutants) >= 150
    areas = ("objectives", "experience", "learner", "stages", "policy", "engine", "chat", "rewards", "evaluate")
    assert {m.area for m in mutants} == {*areas, "export", "kernels", "sandbox"}


def test_a_line_that_has_moved_is_told(tmp_path: Path):
    (tmp_path / "test_one.py").touch()
    file = tmp_path / "one.py"
    file.write_text("return a < b\n")
    assert misplaced([LINE], tmp_path) == []
    assert "no tests other.py" in misplaced([replace(LINE, tests=("other.py",))], tmp_path)[0]
    assert "twice" in misplaced([LINE, LINE], tmp_path)[0]
    for text, times in (("return a > b", 0), ("return a < b\n" * 2, 2)):
        file.write_text(text)
        assert f"is there {times} times" in misplaced([LINE], tmp_path)[0]
    file.unlink()
    assert "is there 0 times" in misplaced([LINE], tmp_path)[0]


def test_a_file_is_as_it_was_after_its_turn(tmp_path: Path):
    file = tmp_path / "one.py"
    file.write_text("def f(a, b):\n    return a < b\n")
    with mutated(tmp_path, LINE):
        assert file.read_text() == "def f(a, b):\n    return a <= b\n"
    assert file.read_text() == "def f(a, b):\n    return a < b\n"


def test_targets_and_survivors(capsys):
    explained = replace(LINE, equivalent="it is never asked of equals")
    caught, missed = Outcome(LINE, True, True, 1.0), Outcome(explained, False, False, 1.0)
    assert report([caught] * 99 + [missed])
    assert "it is never asked of equals" in capsys.readouterr().out
    assert not report([caught] * 99 + [replace(missed, mutant=LINE)])
    assert "NOT EXPLAINED" in capsys.readouterr().out
    assert not report([caught] * 9 + [missed])
    assert not report([replace(caught, by_verify=False)] * 50 + [caught] * 50)
    assert report([replace(caught, by_verify=None)] * 5)
    assert SHARES["tests"] >= 0.97
