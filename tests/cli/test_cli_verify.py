"""`rlpost verify`: the proof on stdout, and an exit code that a script can rely on."""

from __future__ import annotations

import json
import sys

import pytest

from rlpost.cli.app import main
from rlpost.oracle import claims_groups, report


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rlpost", "verify", "--vocab", "2", "--depth", "2", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_proof_goes_to_stdout(monkeypatch, capsys):
    assert run(monkeypatch, "--seed", "3") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("vocabulary 2, depth 2, seed 3: ")
    assert printed.out.splitlines()[-1].endswith("none failed")
    assert printed.err == ""


def test_a_wrong_estimator_fails_the_proof_and_the_program(monkeypatch, capsys):
    """A leave-one-out baseline without its G/(G−1): the direction is right and the scale is not."""
    monkeypatch.setattr(claims_groups.advantages, "leave_one_out", claims_groups.advantages.group_mean)
    assert run(monkeypatch) == 1
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  leave_one_out, sequence_sum  ")]
    assert line.endswith(f"FAILED: more than {report.EXACT:.0e}")


def test_the_proof_as_json(monkeypatch, capsys):
    assert run(monkeypatch, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert {"name", "value", "expected", "verdict", "ok"} == set(found["sections"][0]["rows"][0])


@pytest.mark.parametrize("words", ["--vocab 1", "--depth 1", "--seed -1", "--vocab 40 --depth 9"])
def test_a_tree_that_cannot_be_is_refused(monkeypatch, capsys, words):
    assert run(monkeypatch, *words.split()) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_goals_have_a_proof_of_their_own(monkeypatch, capsys):
    assert run(monkeypatch, "goals") == 0
    assert "toward, against the posterior given the goal" in capsys.readouterr().out
