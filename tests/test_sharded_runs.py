"""Runs in shards by the command line: their checkpoints, on as many ranks or others, and after a rank was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import golden
import pytest
import torch
from processes import Trap, finish_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlpost.errors import RankError

RUNS = {run.key: run for run in golden.listed()}
SHARDS = "parallel.strategy=fsdp2"
WHOLE = "parallel.strategy=ddp"
LONGER = ["stages.sft.steps=6", "--allow-change"]
KILLS = [
    (0, Trap("rlpost.run.stage:write_shards", 2)),
    (1, Trap("rlpost.run.stage:write_shards", 1)),
    (1, Trap("rlpost.run.stage:write_shards", 4)),
    (0, Trap("rlpost.run.files:_swap", 2)),
    (1, Trap("rlpost.train.learner:Learner.update", 3)),
    (0, Trap("rlpost.policy.sharded:Sharding.announce", 2)),
    (0, Trap("rlpost.stages.context:save_policy")),
]
"""The rank that is killed, and when: while a checkpoint is written, by either; in an update; before the result is."""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """`rlpost train` of a recipe with a checkpoint after every step."""
    run = RUNS["sft"]
    golden.write_recipe(run, tmp_path)
    constant = [f"stages.sft.{key}" for key in ("schedule=constant", "warmup=0", "steps=3", "checkpoint_every=1")]
    return ["train", str(tmp_path / "tiny.yaml"), *run.overrides, *constant]


def results(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The metrics of all steps, and the final weights."""
    stage = folder / "runs/run/sft"
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return metrics, load_file(stage / "final/model.safetensors")


def must_be_near(found: tuple, expected: tuple) -> None:
    for own, known in zip(found[0], expected[0], strict=True):
        assert own == pytest.approx(known, rel=1e-3)
    for name, x in expected[1].items():
        assert torch.allclose(found[1][name], x, atol=1e-3), name


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "others", [[(2, SHARDS), (1, WHOLE)], pytest.param([(3, SHARDS), (1, SHARDS), (2, WHOLE)], marks=pytest.mark.slow)]
)
def test_goes_on_on_the_same_ranks_bit_for_bit_and_on_others(
    others: list[tuple[int, str]], words: list[str], tmp_path: Path
):
    """From three steps in shards to six, against six at once."""
    at_once, runs = {}, tmp_path / "runs"
    for count, strategy in ((2, SHARDS), (1, WHOLE)):
        assert finish_on_ranks(count, [*words, strategy, *LONGER], tmp_path / "said") == [0] * count
        at_once[count] = results(tmp_path)
        runs.rename(tmp_path / f"at_once{count}")
    must_be_near(at_once[2], at_once[1])
    assert finish_on_ranks(2, [*words, SHARDS], tmp_path / "said") == [0, 0]
    last = runs / "run/sft/checkpoints/step-000003"
    parts = sorted((last / "weights.shards").iterdir())
    assert len(parts) == 2
    assert parts[0].stat().st_size == pytest.approx(parts[1].stat().st_size, rel=0.2)
    kept = tmp_path / "kept"
    runs.rename(kept)
    for count, strategy in others:
        shutil.copytree(kept, runs)
        assert finish_on_ranks(count, [*words, strategy, *LONGER], tmp_path / "said") == [0] * count
        found = results(tmp_path)
        must_be_near(found, at_once[1])
        if (count, strategy) == (2, SHARDS):
            assert found[0] == at_once[2][0]
            assert all(torch.equal(found[1][name], x) for name, x in at_once[2][1].items())
        shutil.rmtree(runs)


def test_the_result_is_an_ordinary_folder(words: list[str], tmp_path: Path):
    assert finish_on_ranks(2, [*words, SHARDS], tmp_path / "said") == [0, 0]
    final = tmp_path / "runs/run/sft/final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert not list(final.rglob("*.shards"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("rank", "trap"), KILLS, ids=[f"{rank} {t.target} {t.at}" for rank, t in KILLS])
def test_a_run_goes_on_after_any_kill(rank: int, trap: Trap, words: list[str], tmp_path: Path):
    assert finish_on_ranks(2, [*words, SHARDS], tmp_path / "said") == [0, 0]
    expected = results(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    codes = finish_on_ranks(2, [*words, SHARDS], tmp_path / "said", {rank: trap})
    assert codes[rank] == -trap.number
    assert codes[1 - rank] == RankError.exit_code
    assert finish_on_ranks(2, [*words, SHARDS], tmp_path / "said") == [0, 0]
    found = results(tmp_path)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], x) for name, x in expected[1].items())
    assert not list((tmp_path / "runs").rglob("*.tmp-*"))
