"""What the tests of reward models and of process reward models share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from families import EndTokenOnly, tiny
from safetensors.torch import load_file
from tiny_recipes import base, policy

from rlpost.policy import adapters
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.load import remove_dropout
from rlpost.policy.params import Lora, Model
from rlpost.policy.policy import Policy
from rlpost.policy.value_head import HEAD_FILE, ValueHeadModel, load_value_head_model
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner, LossFunction
from rlpost.types import Group

EVERYTHING = 10**6


def make_model(lora: bool = False) -> ValueHeadModel:
    """A model in float64 whose head says something, on flat rows."""
    model = tiny("gpt2", torch.float64)
    remove_dropout(model)
    use_attention(model, FLAT)
    if lora:
        model = adapters.add_policy_adapter(model.requires_grad_(False), Lora(r=2, alpha=4.0)).double()
    scalar = ValueHeadModel(Policy(model, EndTokenOnly(), flat=True).eval())
    with torch.no_grad():
        scalar.head.weight.copy_(torch.randn(scalar.head.weight.shape, generator=torch.Generator().manual_seed(3)))
    return scalar


def gradient(
    model: ValueHeadModel, groups: Sequence[Group], weighted, loss: LossFunction, budget: int, whole_groups: bool
) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of an update cut by a budget, and its metrics."""
    learner = Learner(model, learning_rate=1.0, max_tokens_per_microbatch=budget, whole_groups=whole_groups)
    metrics = learner.gradient(loss, weighted(Experience(tuple(groups))))
    return learner.flat_gradient(), metrics


def saved(folder: Path) -> ValueHeadModel:
    """The reward model of a checkpoint."""
    return load_value_head_model(folder, Model(), bfloat16=False, device="cpu")


def assert_only_the_right_weights_moved(folder: Path, stage: str, lora: bool) -> None:
    """The head, and the adapter or all weights but the layer of logits, against the run's base model."""
    final = folder / "runs/run" / stage / "final"
    files = sorted(f.name for f in final.glob("*.safetensors"))
    assert files == [("adapter_model" if lora else "model") + ".safetensors", HEAD_FILE]
    assert float(load_file(final / HEAD_FILE)["weight"].abs().max()) > 0
    before = dict(policy(base(folder)).causal_lm.named_parameters())
    after = dict(saved(final).trunk.causal_lm.named_parameters())
    if lora:
        moved = [n for n in after if "lora_B" in n and bool(after[n].any())]
        assert len(moved) == sum("lora_B" in n for n in after)
        after = {n.replace(".base_layer", ""): p for n, p in after.items() if "lora_" not in n}
    assert after.keys() == before.keys()
    same = {n for n in before if torch.equal(before[n], after[n])}
    assert same == (set(before) if lora else {"lm_head.weight"})
