"""A model's memory by its configuration: weights, moments, and what a pass keeps, as they are of the model itself."""

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY
from tiny_folders import save
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.inference.memory_plan import moments_of
from rlpost.policy.footprint import Footprint, footprint
from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.policy.policy import Policy
from rlpost.train.optimizers import Optimizer
from rlpost.train.params import OptimizerName
from rlpost.types import Completion, Group

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
WAYS = {
    "full": Model(path="x"),
    "lora": Model(path="x", lora=Lora(r=4)),
    "checkpointed": Model(path="x", gradient_checkpointing=True),
    "plain": Model(path="x", fast=False),
}


def both(way: str, tmp_path, family: str = "llama", bfloat16: bool = False) -> tuple[Footprint, Policy]:
    """What is said of a model, and the model."""
    config = AutoConfig.for_model(family, **SIZES)
    folder = save(tmp_path / "model", AutoModelForCausalLM.from_config(config))
    policy = load_policy(folder, WAYS[way], bfloat16=bfloat16, device="cpu")
    return footprint(config, WAYS[way], bfloat16=bfloat16, cpu=True), policy


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_are_counted_as_they_are(way, family, tmp_path):
    said, policy = both(way, tmp_path, family)
    of_adapter = sum(p.numel() for n, p in policy.named_parameters() if "lora_" in n)
    assert said.base == 4 * (sum(p.numel() for p in policy.parameters()) - of_adapter)
    assert said.adapter == 4 * of_adapter
    assert said.trained == sum(p.numel() for p in policy.trained().values())
    layers = policy.layer_matrices()
    assert sorted(said.matrices) == sorted(p.numel() for n, p in policy.trained().items() if n in layers)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_pass_keeps_is_what_autograd_saves(way, family, tmp_path):
    """Without its logits; the estimate counts what final states and their gradients take as well."""
    said, policy = both(way, tmp_path, family)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    found: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    row = Group(range(1, 17), (Completion(range(1, 49), (True,) * 48),))
    batch = policy.train().batch([row] * 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        states = policy.states(batch)
    # Recomputed layers keep their scores one at a time, when it is their turn.
    scores = 0.0 if way == "checkpointed" else said.a_token(64) - said.kept - said.at_work
    ends = 6 * 64 * 4
    assert sum(found.values()) / len(states) == pytest.approx(said.kept - ends + scores, rel=0.15)


@pytest.mark.parametrize("optimizer", [OptimizerName.adamw, OptimizerName.muon])
@pytest.mark.parametrize("way", ["full", "lora"])
def test_moments_are_those_that_an_optimizer_keeps(way, optimizer, tmp_path):
    said, policy = both(way, tmp_path)
    named = policy.trained()
    made = Optimizer(named, policy.layer_matrices(), optimizer, betas=(0.9, 0.99), weight_decay=0.0)
    for p in named.values():
        p.grad = torch.ones_like(p)
    made.step(1e-3)
    kept = sum(x.nbytes for key, x in made.tensors().items() if not key.endswith("/step"))
    assert moments_of(optimizer, said.matrices, said.others) == kept


def test_moments_of_8_bits():
    assert moments_of(OptimizerName.adamw_8bit, (4096, 1000), 10) == 2 * 4096 + 8 * 16 + 8 * 1010
