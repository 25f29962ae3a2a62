"""The balance loss of mixtures of experts: transformers' own, and the same however an update is cut."""

from __future__ import annotations

import pytest
import torch
from exactness import sample_groups
from families import EndTokenOnly
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlpost.policy.balance import balance_of, is_mixture, own_coefficient
from rlpost.policy.check import check_exactness
from rlpost.policy.policy import Policy
from rlpost.train.experience import Experience
from rlpost.train.learner import Learner
from rlpost.train.meter import BALANCE
from rlpost.types import Group

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "minimax_m2"]


def made(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{k: v for k, v in SIZES.items() if hasattr(known, k)})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    exact = check_exactness(model, EndTokenOnly())
    return Policy(model, EndTokenOnly(), flat=exact.flat, **exact.ways())


def nothing(scores, part):
    return 0.0 * scores.logp_N.sum(), {}


def gradient(policy: Policy, groups: list[Group], budget: int) -> tuple[torch.Tensor, float]:
    learner = Learner(
        policy,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_tokens_per_microbatch=budget,
        balance=balance_of(policy.causal_lm, 1.0),
    )
    metrics = learner.update(nothing, Experience(groups))
    return learner.flat_gradient(), metrics[BALANCE]


def transformers_own(policy: Policy, groups: list[Group]) -> tuple[torch.Tensor, float]:
    """Of padded rows in one batch, by the family's function."""
    rows = [[*g.prompt, *c.ids] for g in groups for c in g.completions]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    model = policy.causal_lm
    model.set_attn_implementation("eager")
    said = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    loss = load_balancing_loss_func(said.router_logits, 4, 2, mask)
    named = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, named, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for g, p in zip(found, named, strict=True)]
    return torch.cat([g.flatten() for g in flat]), float(loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_that_of_transformers(family):
    policy = made(family)
    groups = sample_groups(64)
    found, value = gradient(policy, groups, 1 << 20)
    expected, loss = transformers_own(policy, groups)
    assert value == pytest.approx(loss, rel=1e-5)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert expected.norm() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_does_not_depend_on_how_an_update_is_cut(checkpointing):
    policy = made("mixtral", torch.float64)
    if checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    groups = sample_groups(64)
    whole, value = gradient(policy, groups, 1 << 20)
    for budget in (40, 1):
        cut, same = gradient(policy, groups, budget)
        assert same == pytest.approx(value, rel=1e-6)
        assert (cut - whole).norm() <= 1e-6 * whole.norm()
    alone = [Group(g.prompt, (c,)) for g in groups for c in g.completions]
    unshared, same = gradient(policy, alone, 1 << 20)
    assert same == pytest.approx(value, rel=1e-6)
    assert (unshared - whole).norm() <= 1e-6 * whole.norm()


def test_a_mean_of_parts_would_be_another_loss():
    policy = made("mixtral")
    groups = sample_groups(64)
    whole = gradient(policy, groups, 1 << 20)[1]
    parts = [gradient(policy, [g], 1 << 20)[1] for g in groups]
    assert abs(sum(parts) / len(parts) - whole) > 1e-3


def test_dense_models_have_none():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{k: v for k, v in SIZES.items() if "expert" not in k})
    dense = AutoModelForCausalLM.from_config(config)
    assert not is_mixture(dense)
    assert balance_of(dense, 1.0) is None
    mixture = made("mixtral").causal_lm
    assert is_mixture(mixture)
    assert own_coefficient(mixture) == 0.001
