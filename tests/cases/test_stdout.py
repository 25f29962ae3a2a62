"""stdout is for results: what users' code and libraries print while a command runs is heard on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import save_model, save_recipe, save_rows

LOUD = """
import os
print("imported")
os.write(1, b"natively imported\\n")

def reward(completion):
    print("scoring", len(completion.text))
    os.write(1, b"natively scoring\\n")
    os.system("echo a child scoring")
    return float(len(completion.text))

def rows(row):
    print("mapping")
    return row

def shown(row, random):
    print("presenting")
    return row

def advantage(reward_PG):
    print("advantages")
    os.write(1, b"natively\\n")
    return reward_PG - reward_PG.mean()

def loss(logp_N, old_logp_N, advantage_N, rows):
    print("losses")
    return -logp_N * advantage_N

def reply(text, turns, example):
    print("replying")
    return None
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rlpost", *words], capture_output=True, text=True, env={**os.environ})


@pytest.mark.parametrize("as_json", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "json"])
def test_a_checkpoints_path_is_all_that_train_prints_however_loud_the_users_code_is(here: Path, as_json, tally):
    save_model(here / "m")
    save_rows(here / "d.jsonl", [{"prompt": "hi"}, {"prompt": "yo"}])
    (here / "my.py").write_text(LOUD)
    stage = {
        "kind": "grpo",
        "data": {"c": {"path": "d.jsonl", "map": {"fn": "my.py:rows"}, "augment": {"fn": "my.py:shown"}}},
        "steps": 1,
        "prompts_per_step": 2,
        "group_size": 2,
        "learning_rate": 1e-3,
        "sampling": {"max_new_tokens": 4},
        "environment": {"fn": "my.py:reply"},
        "rewards": [{"fn": "my.py:reward"}],
        "advantage": {"fn": "my.py:advantage"},
        "loss": {"fn": "my.py:loss"},
    }
    recipe = {"model": {"path": "m", "precision": "float32"}, "stages": {"g": stage}}
    save_recipe(here / "r.yaml", recipe)
    done = run("train", "r.yaml", *(["--json"] if as_json else []))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert Path(json.loads(line)["checkpoint"] if as_json else line).is_dir()
    for word in ("imported", "natively", "scoring", "a child", "mapping", "presenting", "advantages", "losses"):
        assert word in done.stderr
    tally("stdout", right=1)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["list"]], ids=" ".join)
def test_help_and_lists_are_results(here: Path, words, tally):
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    tally("stdout", right=1)


def test_a_command_without_a_stderr_still_answers(here: Path, tally):
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m rlpost list 2>&-"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("recipes:")
    tally("stdout", right=1)
