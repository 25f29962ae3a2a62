"""Every stage kind gives the numbers it gave when its reference was written; and a reference can be missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import golden
import pytest

from rlpost.recipe.kinds import kinds

RUNS = golden.listed()


def test_every_kind_has_a_run_and_every_run_a_reference():
    told = {stage["kind"] for run in RUNS for stage in run.recipe["stages"].values()}
    assert told == set(kinds())
    assert {run.file for run in RUNS} == set(golden.REFERENCES.glob("*.json"))


@pytest.fixture
def reference():
    return json.loads((golden.REFERENCES / "grpo.json").read_text("utf-8"))["left"]


def difference(found, expected):
    return golden.compare(found, expected, golden.TOLERANCE, golden.ABSOLUTE)


def test_a_token_a_log_probability_and_a_metric_are_seen(reference):
    def changed(change):
        found = json.loads(json.dumps(reference))
        change(found["stages"]["grpo"])
        return difference(found, reference)

    same = changed(lambda _: None)
    assert (same.others, same.worst) == ([], 0)

    first = "step-000001"
    token = changed(lambda s: s["rollouts"][first][0]["completions"][0]["ids"].__setitem__(0, 5))
    assert len(token.others) == 1
    assert token.others[0].startswith("/stages/grpo/rollouts/step-000001/0/completions/0/ids/0: 5, was ")

    def move(by):
        def change(stage):
            stage["rollouts"][first][0]["completions"][0]["logprobs"][0] += by

        return changed(change)

    assert move(5e-6).worst <= 1 < move(1e-4).worst
    assert changed(lambda s: s["metrics"][0].pop("loss")).others
    assert changed(lambda s: s["metrics"][0].update(new=1.0)).others
    assert changed(lambda s: s["weights"]["model.safetensors"]["sums"].__setitem__(0, 0.0)).worst > 1


def test_a_reference_is_not_replaced_without_a_reason():
    run = next(run for run in RUNS if run.key == "grpo")
    before = run.file.read_bytes()
    assert golden.written(run, None) == ("grpo                         kept: replaced only with --reason", True)
    line, well = golden.written(run, "for fun")
    assert "REFUSED" in line
    assert not well
    assert run.file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_numbers_are_those_of_the_references():
    # As a process: what its commands print is read from file descriptor 1.
    words = [sys.executable, str(Path(golden.__file__))]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(golden.ROOT)})
    assert done.returncode == 0, [line for line in done.stdout.splitlines() if " same" not in line]
