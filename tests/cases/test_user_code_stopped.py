"""A scheduler's signal while a user's function runs; rewards that tell nothing apart."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import start
from tiny_world import rlpost, save_model, save_recipe, save_rows

WAITS = """
import os, random, time
calls = 0
def f(completion):
    global calls
    calls += 1
    if calls > 8 and os.path.exists("hang"):  # in the third step of four completions
        with open("hanging", "w") as file:
            file.write(str(os.getpid()))
        HOW
    return len(completion.text) + random.random()
"""
STUCK = "__import__('re').match('(a+)+b', 'a' * 60)"


def recipe(here: Path, source: str, **stage: Any) -> Path:
    save_model(here / "m")
    save_rows(here / "d.jsonl", [{"prompt": "hi"}, {"prompt": "yo"}, {"prompt": "ho"}])
    (here / "my.py").write_text(source)
    made = {
        "kind": "grpo",
        "data": {"c": {"path": "d.jsonl"}},
        "steps": 4,
        "prompts_per_step": 2,
        "group_size": 2,
        "learning_rate": 1e-2,
        "table_every": 0,
        "sampling": {"max_new_tokens": 3},
        "rewards": [{"fn": "my.py:f", "deadline": 3600}],  # so that only a signal ends a call
        **stage,
    }
    return save_recipe(here / "r.yaml", {"model": {"path": "m", "precision": "float32"}, "stages": {"g": made}})


def wait_until(true: Any) -> None:
    end = time.monotonic() + 120
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    assert true()


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize(
    ("number", "how"),
    [pytest.param(signal.SIGINT, "time.sleep(600)", marks=pytest.mark.slow), (signal.SIGTERM, STUCK)],
)
def test_a_signal_is_answered_while_a_reward_hangs_and_nothing_is_lost(here: Path, number, how, tally):
    file = recipe(here, WAITS.replace("HOW", how))
    assert rlpost("train", file, "run=whole").code == 0
    (here / "hang").touch()
    process = start(["train", str(file)], here / "said")
    wait_until(lambda: (here / "hanging").exists() or not process.is_alive())
    worker = int((here / "hanging").read_text())
    assert alive(worker)
    os.kill(process.pid, number)
    process.join(60)
    assert (process.exitcode, (here / "said.out").read_text()) == (128 + number, "")
    said = (here / "said.err").read_text()
    assert "g stopped while a user's function ran, after step 2 with a checkpoint" in said
    assert (here / "runs/r/g/checkpoints/step-000002").is_dir()
    wait_until(lambda: not alive(worker))
    (here / "hang").unlink()
    assert rlpost("train", file).code == 0
    left = [[(here / "runs" / run / "g" / name).read_bytes() for name in ("metrics.jsonl",)] for run in ("whole", "r")]
    assert left[0] == left[1]
    weights = [(here / "runs" / run / "g/final/model.safetensors").read_bytes() for run in ("whole", "r")]
    assert weights[0] == weights[1]
    tally("users' functions", right=1)


def test_a_worker_does_not_outlive_a_killed_run(here: Path, tally):
    file = recipe(here, WAITS.replace("HOW", STUCK))
    (here / "hang").touch()
    process = start(["train", str(file)], here / "said")
    wait_until(lambda: (here / "hanging").exists() or not process.is_alive())
    process.kill()
    process.join(60)
    wait_until(lambda: not alive(int((here / "hanging").read_text())))
    tally("users' functions", right=1)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("0.0", "every reward of step 1 is 0; no gradient from them"),
        ("None", "no completion of step 1 has a reward; nothing is learned from them"),
    ],
)
def test_rewards_that_tell_nothing_apart_are_spoken_of_once(here: Path, value, told, tally):
    source = f"""
import os
calls = 0
def f(completion):
    global calls
    calls += 1
    return {value} if calls <= 8 else float(calls)
"""
    done = rlpost("train", recipe(here, source))
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "of step 1" in line]
    assert line == f"warning: g: {told}"
    assert "of step 2" not in done.err
    assert "g: rewards differ again from step 3 on" in done.err
    lines = [json.loads(x) for x in (here / "runs/r/g/metrics.jsonl").read_text().splitlines()]
    assert [("reward" in line, line.get("reward")) for line in lines[:2]] == [
        (False, None) if value == "None" else (True, 0.0)
    ] * 2
    assert lines[2]["reward"] == 10.5
    tally("rewards that tell nothing apart", right=1)
