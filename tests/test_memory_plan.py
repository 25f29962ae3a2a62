"""What `--dry-run` says of the stages' memory, beside what runs of three sizes take."""

from __future__ import annotations

import dataclasses

import pytest
from memory_check import CASES, TOLERANCE, in_process
from tiny_recipes import GRPO, LORA, PAIRS, SFT, prepared

from rlpost.inference import memory_plan
from rlpost.inference.memory_plan import Device, StageMemory
from rlpost.pipeline import dry_run

# --- The table


def test_a_dry_run_shows_every_stage_that_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_plan, "here", lambda: Device("cpu", 2**40))
    stages = {"sft": SFT, "pairs": PAIRS, "grpo": {**GRPO, "kl": {"beta": 0.1}}}
    *_, head, names, sft, grpo = dry_run(prepared(tmp_path, stages, LORA))
    assert head == "memory, about, of 1024.0 GiB for the CPU"
    assert names.split() == ["weights", "gradients", "moments", "beside", "passes", "sampling", "at", "most"]
    assert (sft.split()[0], grpo.split()[0]) == ("sft", "grpo")


def test_what_stands_beside_the_model(tmp_path):
    def beside(stage: dict, *overrides: str) -> int:
        (found,) = memory_plan.plan(prepared(tmp_path, {"grpo": {**GRPO, **stage}}, *overrides), Device("cpu", None))
        return found.beside

    weights = memory_plan.plan(prepared(tmp_path, {"sft": SFT}), Device("cpu", None))[0].weights
    assert beside({}) == 0
    assert beside({"kl": {"beta": 0.1}}) == weights
    assert 0 < beside({"kl": {"beta": 0.1}}, LORA) < weights
    # A process that samples ahead has the model, and as many versions of what is trained as its staleness and one.
    ahead = {k: beside({"rollouts": {"staleness": k}}) for k in (0, 1, 3)}
    assert (ahead[0], ahead[3] - ahead[1]) == (0, 2 * weights)
    assert ahead[1] > 3 * weights
    assert 0 < beside({"rollouts": {"staleness": 3}}, LORA) - beside({"rollouts": {"staleness": 1}}, LORA) < weights


STAGE = StageMemory("sft", 4 << 30, 4 << 30, 8 << 30, 0, 1 << 30, 0, 0)


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({}, "set model.lora, optimizer: adamw_8bit, or take a smaller model"),
        ({"passes": 20 << 30}, "lower max_tokens_per_microbatch or max_length, or set model.gradient_checkpointing"),
        ({"sampling": 20 << 30}, "lower prompts_per_step, group_size or sampling.max_new_tokens"),
    ],
)
def test_a_stage_beyond_the_device_is_warned_of(tmp_path, monkeypatch, more, remedy):
    monkeypatch.setattr(memory_plan, "here", lambda: Device("cuda", 16 << 30))
    monkeypatch.setattr(memory_plan, "plan", lambda *_: [dataclasses.replace(STAGE, **more)])
    *_, line = memory_plan.lines(prepared(tmp_path, {"sft": SFT}))
    assert line.startswith("warning: stages.sft: needs about ")
    assert f"of 16.0 GiB: {remedy}" in line


def test_a_model_that_is_not_there_is_not_estimated(tmp_path):
    (line,) = memory_plan.lines(prepared(tmp_path, {"sft": SFT}, model={"path": "nowhere/model"}))
    assert line.startswith("memory: not estimated: nowhere/model")


# --- Measured


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_it_is_within_a_fifth_of_what_is_measured(case):
    estimated, measured = in_process(case)
    assert abs(estimated / measured - 1) <= TOLERANCE, (estimated, measured)
