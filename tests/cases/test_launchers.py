"""Several processes that are no ranks of one run: every one of them is refused, in one line, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_world import rlpost, save_recipe, save_rows

ENVIRONMENTS = [
    {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    {"LOCAL_WORLD_SIZE": "4"},
    {"RANK": "1"},
    {"LOCAL_RANK": "3"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    {"PMI_SIZE": "2", "PMI_RANK": "0"},
    {"MV2_COMM_WORLD_SIZE": "2"},
    {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"},
    {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
]
ALONE = [
    {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "1"},
    {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NPROCS": "8"},  # the batch script of a job
    {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    {"WORLD_SIZE": "", "RANK": "first"},
]


@pytest.fixture
def recipe(here: Path) -> Path:
    save_rows(here / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    sft = {"kind": "sft", "data": {"c": {"path": "d.jsonl"}}, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}
    return save_recipe(here / "r.yaml", {"model": {"path": "m", "precision": "float32"}, "stages": {"s": sft}})


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: ",".join(e))
@pytest.mark.parametrize("words", [["train", "r.yaml"], ["pairs", "m", "--recipe", "r.yaml", "--out", "p.jsonl"]])
def test_one_of_several_processes_is_refused(environment, words, recipe: Path, monkeypatch, tally) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = rlpost(*words)
    assert ran.refused(2, "cannot reach each other", "started as"), ran.err
    assert ran.err.count("\n") == 1
    assert sorted(p.name for p in recipe.parent.iterdir()) == ["d.jsonl", "r.yaml"]
    tally("launchers of several processes", refused=1)


@pytest.mark.parametrize("environment", ALONE, ids=lambda e: ",".join(e))
def test_a_process_that_is_alone_is_not(environment, recipe: Path, monkeypatch, tally) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = rlpost("train", "r.yaml", "--dry-run")
    assert ran.code == 0, ran.err
    tally("launchers of several processes", right=1)


def test_reading_commands_run_anywhere(recipe: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rlpost("show", "r.yaml").code == 0
    assert rlpost("list").code == 0


def test_other_commands_are_refused_even_to_ranks(recipe: Path, monkeypatch, tally) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ran = rlpost("sample", "m", "1+1=")
    assert ran.refused(2, "nothing to share", "started as"), ran.err
    tally("launchers of several processes", refused=1)
