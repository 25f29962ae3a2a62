"""Looking ahead, and reading a row by its length, are found in every precision."""

import pytest
import torch
from families import COMMON, NO_END, EndTokenOnly
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.policy.check import check_exactness

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 4096,
    "factor": 8.0,
}
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def fresh(family: str, dtype: torch.dtype, **fields):
    """At the size that weights have before any training: a leak is small then."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **NO_END, "pad_token_id": 0, **fields})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@HALVES
def test_the_length_at_which_factors_switch_is_found_and_left_as_it_was(dtype):
    model = fresh(
        "phi3", dtype, max_position_embeddings=131072, rope_parameters=LONG, original_max_position_embeddings=4096
    )
    exact = check_exactness(model, EndTokenOnly())
    assert (exact.flat, exact.switch, exact.reach, exact.refused) == (True, 4096, None, "")
    assert model.config.rope_parameters["original_max_position_embeddings"] == 4096


@HALVES
def test_an_encoder_fresh_from_its_configuration_is_refused(dtype):
    assert "later tokens" in check_exactness(fresh("bert", dtype), EndTokenOnly()).refused
    assert check_exactness(fresh("bert", dtype, is_decoder=True), EndTokenOnly()).refused == ""


@HALVES
def test_other_models_have_no_such_length(dtype):
    for family in ("llama", "mixtral"):
        exact = check_exactness(fresh(family, dtype), EndTokenOnly())
        assert (exact.flat, exact.switch, exact.reach, exact.refused) == (True, None, None, "")
