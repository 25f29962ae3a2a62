"""What vLLM is handed: the weights by the names that a checkpoint has, or an adapter, and what it could not load."""

from __future__ import annotations

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from stubs import tiny_policy
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.engine.vllm_weights import (
    handed_over,
    lora_rank,
    must_be_servable,
    named_weights,
    positions,
    write_weights,
)
from rlpost.errors import ModelError
from rlpost.policy.adapters import POLICY, add_policy_adapter
from rlpost.policy.params import Lora


class Tokens:
    """Writes nothing."""

    eos_token_id = 3

    def save_pretrained(self, folder):
        pass


def made(family: str = "llama", **lora):
    policy = tiny_policy(family)
    policy.tokenizer = Tokens()
    if lora:
        torch.manual_seed(1)
        policy.model = add_policy_adapter(policy.model, Lora(**lora))
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return policy


def written(policy, folder, merge: bool) -> dict[str, torch.Tensor]:
    write_weights(policy, folder, merge)
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def must_be_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name].cpu(), x, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_named_as_in_the_saved_model(family, tmp_path):
    policy = made(family)
    must_be_equal(dict(named_weights(handed_over(policy, False))), written(policy, tmp_path, False))


@pytest.mark.parametrize("loaded", [False, True])
def test_experts_are_handed_over_as_they_are_saved(loaded, tmp_path):
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **size, **heads))
    model.save_pretrained(tmp_path)
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    must_be_equal(dict(named_weights(model)), saved)
    assert any("experts.0.w1" in name for name in saved)
    assert not any("experts.0" in name for name in model.state_dict())  # one tensor, while it computes


def test_a_merged_adapter_is_handed_over_in_whole_weights(tmp_path):
    policy = made(r=4)
    found = dict(named_weights(handed_over(policy, True)))
    must_be_equal(found, written(policy, tmp_path, True))
    base = policy.causal_lm.model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], base)
    assert not [name for name in found if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize(("pissa", "rank"), [(None, 4), ("pissa", 8)])
def test_an_adapter_is_a_folder_and_no_weights(pissa, rank, tmp_path):
    policy = made(r=4, init_lora_weights=pissa)
    assert handed_over(policy, False) is None
    found = written(policy, tmp_path, False)
    assert all("lora_" in name for name in found)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == rank
    assert lora_rank(policy) == 8


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({"use_dora": True}, "model.lora.use_dora: vLLM has no DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"model.lora.modules_to_save=.*lm_head.*: vLLM's adapters have no whole"),
        ({"r": 513}, "model.lora.r: vLLM's adapters have ranks up to 512, and this one has 513"),
    ],
)
def test_an_adapter_that_vllm_cannot_load_is_refused_and_can_be_merged(lora, line):
    policy = made(**lora)
    with pytest.raises(ModelError, match=rf"^{line}.*set rollouts.merge_adapter=true"):
        must_be_servable(policy, False, "rollouts")
    must_be_servable(policy, True, "rollouts")


def test_an_adapter_with_tokens_of_its_own_is_refused():
    policy = tiny_policy()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    policy.model = peft.get_peft_model(policy.model, config, adapter_name=POLICY)
    with pytest.raises(ModelError, match="trainable_token_indices: vLLM's adapters have no tokens of their own"):
        must_be_servable(policy, False, "rollouts")


def test_merged_weights_in_shards_are_refused():
    policy = made(r=2)
    must_be_servable(policy, False, "rollouts")
    policy.sharding = SimpleNamespace()
    with pytest.raises(ModelError, match=r"rollouts.merge_adapter: weights in shards cannot be merged"):
        must_be_servable(policy, True, "rollouts")


def test_rows_are_no_longer_than_vllm_reads_them_alike():
    policy = made()
    assert positions(policy) == policy.max_positions
    policy.switch = 20
    assert positions(policy) == 20
