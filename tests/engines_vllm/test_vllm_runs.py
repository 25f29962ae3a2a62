"""Runs by the command line that sample by vLLM: killed and gone on, on two processes, and what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import Trap, finish, finish_on_ranks
from safetensors.torch import load_file
from tiny_recipes import GRPO, MODEL, SFT, write
from tiny_vllm import NEEDS_VLLM

from rlpost.errors import ModelError

pytestmark = [*NEEDS_VLLM, pytest.mark.timeout(600)]
WIDE = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 64}
HERE = {"engine": "vllm", "cache_gib": 0.1}
STAGES = {"sft": {**SFT, "learning_rate": 3e-3}, "grpo": {**GRPO, "steps": 5, "checkpoint_every": 2}}


def words(folder: Path, *more: str, stages: dict = STAGES, **rollouts: object) -> list[str]:
    model = {**MODEL, "config": {**MODEL["config"], **WIDE}}
    file = write(folder, stages, model=model, rollouts={**HERE, **rollouts})
    return ["train", str(file), *more]


def result(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    stage = folder / "runs/run/grpo"
    (file,) = (stage / "final").glob("*.safetensors")
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()], load_file(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(words(folder), folder / "said") == 0
    return folder


def must_be_the_same(folder: Path, expected: Path) -> None:
    (rows, weights), (found, own) = result(expected), result(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert found == [{**row, **untold(mine)} for row, mine in zip(rows, found, strict=True)]
    assert {name: x.tolist() for name, x in own.items()} == {name: x.tolist() for name, x in weights.items()}


def untold(row: dict[str, float]) -> dict[str, float]:
    """What differs between any two runs."""
    return {key: x for key, x in row.items() if "seconds" in key or "per_second" in key or "GiB" in key}


def test_killed_and_gone_on_it_ends_as_if_it_had_gone_through(whole, tmp_path):
    assert finish(words(tmp_path), tmp_path / "killed", Trap("rlpost.train.learner:Learner.update", 8)) < 0
    assert finish(words(tmp_path), tmp_path / "said") == 0
    must_be_the_same(tmp_path, whole)
    assert max(row["sampler_gap"] for row in result(tmp_path)[0]) < 1e-3
    assert (tmp_path / "said.out").read_text() == f"{tmp_path / 'runs/run/grpo/final'}\n"
    said = (tmp_path / "said.err").read_text()
    foreign = ("pid=", "Warning", "site-packages", "VLLM_", "Triton", "seed")
    assert not [line for line in said.splitlines() if any(word in line for word in foreign)]


def test_so_it_does_with_an_adapter_whose_dropout_draws_where_vllm_draws(tmp_path):
    lora = "model.lora={r: 4, alpha: 8, dropout: 0.1}"
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    assert finish(words(folders[0], lora), tmp_path / "said") == 0
    assert finish(words(folders[1], lora), tmp_path / "killed", Trap("rlpost.train.learner:Learner.update", 8)) < 0
    assert finish(words(folders[1], lora), tmp_path / "said") == 0
    must_be_the_same(folders[1], folders[0])


@pytest.mark.parametrize("more", [[], ["parallel.strategy=fsdp2"]], ids=["whole", "shards"])
def test_on_two_processes_it_learns_what_it_learns_on_one(more, whole, tmp_path):
    assert finish_on_ranks(2, words(tmp_path, *more), tmp_path / "two") == [0, 0]
    (expected, weights), (found, own) = result(whole), result(tmp_path)
    for row, known in zip(found, expected, strict=True):
        assert row["reward"] == pytest.approx(known["reward"])
        assert row["sampler_gap"] < 1e-3
    for name, x in weights.items():
        assert torch.allclose(own[name], x, atol=1e-3), name


def test_episodes_run_at_their_own_pace(tmp_path):
    (tmp_path / "says.py").write_text("def reply(text, turns):\n    return None if len(turns) > 2 else '7+'\n")
    turns = {"environment": {"fn": "says.py:reply"}, "max_turns": 4, "mask_truncated": False}
    sampling = {"sampling": {"max_new_tokens": 24, "stop": ["="]}}
    stage = {**GRPO, **turns, **sampling, "steps": 2, "max_length": 48}
    assert finish(words(tmp_path, stages={"grpo": stage}), tmp_path / "said") == 0
    rows, _ = result(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert max(row["sampler_gap"] for row in rows) < 1e-3


def test_a_family_that_vllm_does_not_have_is_refused_before_anything_is_written(tmp_path):
    config = {"model_type": "gpt_neox", **{k: v for k, v in MODEL["config"].items() if k != "model_type"}}
    file = write(tmp_path, STAGES, model={**MODEL, "config": config}, rollouts=HERE)
    assert finish(["train", str(file)], tmp_path / "run") == ModelError.exit_code
    said = (tmp_path / "run.err").read_text()
    last = said.strip().splitlines()[-1]  # what vLLM has loaded lists nothing after it
    assert "rollouts.engine=vllm: vLLM runs GPTNeoXForCausalLM by transformers' code; use engine: local" in last
    assert not (tmp_path / "runs").exists()
