"""Families of models, and weights that are handed over again and again: vLLM has what the policy has, or says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import local
from tiny_vllm import NEAR, NEEDS_VLLM, change, engine, gaps, ids, load, requests, write_model

from rlpost.engine import vllm_here, vllm_process
from rlpost.errors import EngineError, ModelError

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


MIXED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "a head tied to the embedding": ("qwen3", {"tie_word_embeddings": True}, {}),
    "such a head under an adapter": ("qwen3", {"tie_word_embeddings": True}, {"r": 4}),
    "experts": ("qwen3_moe", {**MIXED, "decoder_sparse_step": 1, "mlp_only_layers": []}, {}),
    "sliding windows": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 32}, {}),
    "absolute positions": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}, {}),
}


@pytest.mark.parametrize(("family", "more", "lora"), FAMILIES.values(), ids=FAMILIES.keys())
def test_other_families_sample_alike_before_and_after_an_update(family, more, lora, tmp_path):
    policy = load(write_model(tmp_path, family, **more), **lora)
    made = engine(policy)
    for version in range(2):
        made.update_weights(policy, version)
        asked = requests(16, temperature=0.0)
        assert ids(made.generate(asked)) == ids(local(policy).generate(asked))
        drawn = made.generate(requests(16))
        assert gaps(policy, requests(16), drawn).mean() < NEAR
        change(policy)
        assert gaps(policy, requests(16), drawn).mean() > 30 * NEAR
    made.close()


@pytest.mark.parametrize(
    ("lora", "chosen"),
    [
        ({}, {}),
        ({"r": 4}, {}),
        ({"r": 4, "init_lora_weights": "pissa"}, {}),
        ({"r": 4, "use_rslora": True}, {"merge_adapter": True}),
        ({"r": 4, "modules_to_save": ["lm_head"]}, {"merge_adapter": True}),
    ],
    ids=str,
)
def test_five_updates_are_handed_over_and_none_is_missed(folder, lora, chosen):
    policy = load(folder, **lora)
    made = engine(policy, **chosen)
    torch.manual_seed(3)
    asked = requests(16)
    for version in range(6):
        made.update_weights(policy, version)
        found = made.generate(asked)
        assert gaps(policy, asked, found).mean() < NEAR
        assert {c.weights_version for some in found for c in some} == {version}
        change(policy)
        # Those of the next version are other weights: without the hand-over this would show.
        assert gaps(policy, asked, made.generate(asked)).mean() > 30 * NEAR
    made.close()


def test_in_bfloat16_it_is_as_near_as_that_allows(folder):
    policy = load(folder, bfloat16=True)
    made = engine(policy)
    made.update_weights(policy, 0)
    asked = requests(16)
    far = gaps(policy, asked, made.generate(asked))
    made.close()
    assert NEAR < far.mean() < 100 * NEAR


def test_prompts_that_were_cached_are_read_anew_after_an_update(folder):
    policy = load(folder)
    made = engine(policy)
    (long,) = [r for r in requests(40) if len(r.prompt) == 40]
    asked = [type(long)(np.tile(long.prompt, 2), 8, long.sampling, 1, 20)]
    for version in range(2):
        made.update_weights(policy, version)
        assert gaps(policy, asked, made.generate(asked)).mean() < NEAR
        change(policy)
    made.close()


def test_weights_that_are_missing_end_the_run(folder, monkeypatch):
    policy = load(folder)
    made = engine(policy)
    every = list(vllm_here.named_weights(policy.causal_lm))
    monkeypatch.setattr(vllm_here, "named_weights", lambda _: iter([w for w in every if "layers.1.mlp" not in w[0]]))
    with pytest.raises(EngineError, match=r"model.layers.1.mlp.* of vLLM's weights were not handed over"):
        made.update_weights(policy, 0)
    with pytest.raises(EngineError, match="the engine has no weights yet"):
        made.generate(requests(1))
    made.close()


@pytest.mark.parametrize(
    ("family", "more", "line"),
    [
        ("xglm", {"d_model": 64, "ffn_dim": 96}, r"Model architectures \['XGLMForCausalLM'\] are not supported"),
        ("gpt_neox", {}, "vLLM runs GPTNeoXForCausalLM by transformers' code"),
    ],
)
def test_a_family_that_vllm_does_not_have_is_one_line_that_names_the_local_engine(family, more, line, tmp_path):
    policy = load(write_model(tmp_path, family, **more))
    with pytest.raises(ModelError, match=rf"^rollouts.engine=vllm: .*{line}.*; use engine: local$") as error:
        engine(policy)
    assert "\n" not in str(error.value)
    assert local(policy).generate(requests(1))  # its classes are as they were


def test_what_computes_otherwise_is_refused_before_it_samples(folder, monkeypatch):
    policy = load(write_model(folder.parent / "tied", "qwen3", tie_word_embeddings=True))
    monkeypatch.setattr(vllm_process, "_pack_again", lambda _: None)  # its head stays as it began
    made = engine(policy)
    with pytest.raises(EngineError, match=r"its log-probabilities differ from the policy's by .*; use engine: local"):
        made.update_weights(policy, 0)
    made.close()
