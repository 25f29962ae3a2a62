"""Recipes that sample by vLLM: what it would do otherwise, or cannot have, is refused by key path."""

from __future__ import annotations

import pytest
from tiny_recipes import GRPO, PAIRS, SFT, prepared

from rlpost.errors import ModelError, RecipeError
from rlpost.inference import vllm_check
from rlpost.inference.vllm_check import must_have_vllm

HERE = {"engine": "vllm"}
FILTERED = {**PAIRS, "sampling": {"max_new_tokens": 5, "min_p": 0.1, "top_p": 0.9}}
LORA = {"r": 4, "alpha": 8}


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
@pytest.mark.parametrize(
    ("stage", "overrides", "line"),
    [
        (GRPO, ["stages.s.sampling.temperature=2.5"], "stages.s.sampling.temperature: vLLM takes 0.01 to 2, not 2.5"),
        (FILTERED, [], "stages.s.sampling.min_p: vLLM filters by it before top_p, and rlpost after"),
        (
            GRPO,
            ["rollouts.args={logprobs_mode: raw_logprobs}"],
            "rollouts.args.logprobs_mode: is said by the run",
        ),
        (
            GRPO,
            ["rollouts.args={trust_remote_code: true}"],
            "rollouts.args.trust_remote_code: is said by the r",
        ),
        (GRPO, ["model.lora={use_dora: true}"], "rollouts.merge_adapter: vLLM's adapters are low ranks alone"),
        (GRPO, ["model.lora={modules_to_save: [lm_head]}"], "rollouts.merge_adapter: vLLM's adapters are low ranks"),
        (
            {"kind": "guided", "data": SFT["data"], "network": "net"},
            [],
            "stages.s.rollouts.engine: a guide weighs every token, which only the local engine shows",
        ),
    ],
)
def test_what_vllm_does_otherwise_is_refused(engine, stage, overrides, line, tmp_path):
    with pytest.raises(RecipeError, match=f"^{line}"):
        prepared(tmp_path, {"s": stage}, *overrides, rollouts={"engine": engine})


def test_another_engine_samples_as_it_is_told(tmp_path):
    prepared(tmp_path, {"s": {**FILTERED, "rollouts": {"engine": "local"}}}, rollouts=HERE)
    with pytest.raises(RecipeError, match=r"stages.s.sampling.min_p"):
        prepared(tmp_path, {"s": {**FILTERED, "rollouts": HERE}})


def test_more_processes_are_for_a_server(tmp_path):
    with pytest.raises(RecipeError, match=r"^rollouts.args.tensor_parallel_size: needs processes of vLLM's own"):
        prepared(tmp_path, {"s": GRPO}, rollouts={**HERE, "args": {"tensor_parallel_size": 2}})
    prepared(tmp_path, {"s": GRPO}, rollouts={"engine": "vllm_server", "args": {"tensor_parallel_size": 2}})


def test_vllm_that_is_not_installed_is_one_line_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("rlpost.engine.vllm_process.find_spec", lambda _: None)
    own = {**GRPO, "rollouts": HERE}
    with pytest.raises(ModelError, match=r"^stages.s.rollouts.engine=vllm: needs the package vllm .*: pip install"):
        must_have_vllm(prepared(tmp_path, {"s": own}))
    monkeypatch.setattr(vllm_check, "must_be_installed", lambda _: pytest.fail("it is not asked for"))
    must_have_vllm(prepared(tmp_path, {"s": GRPO}))
    must_have_vllm(prepared(tmp_path, {"s": GRPO}, rollouts={"engine": "vllm_server"}))
