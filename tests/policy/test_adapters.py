"""Adapters: which acts, which trains, and that neither is confused with the other."""

import pytest
import torch
from families import EndTokenOnly, tiny
from tiny_folders import randomise

from rlpost.errors import ModelError
from rlpost.policy import adapters, merge
from rlpost.policy.adapters import POLICY, REFERENCE
from rlpost.policy.attention import FLAT
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy


def lora_policy(family: str = "llama", dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> Policy:
    """A policy whose adapter does something, and a reference adapter equal to it."""
    model = tiny(family, dtype)
    model.set_attn_implementation(FLAT)
    dressed = adapters.add_policy_adapter(model, Lora(r=2, alpha=4.0, dropout=dropout)).to(dtype)
    randomise(dressed)
    adapters.add_adapter(dressed, REFERENCE, adapters.adapter_state(dressed, POLICY))
    return Policy(dressed.to(dtype), EndTokenOnly(), flat=True).eval()


@pytest.fixture
def policy() -> Policy:
    return lora_policy()


@torch.no_grad()
def score(policy, groups):
    return policy(policy.batch(groups)).logp_N


def flags(model) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def gradient(policy, groups):
    policy.zero_grad()
    policy(policy.batch(groups)).logp_N.square().sum().backward()
    policy.backward_done()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_only_the_policy_adapter_trains(policy):
    trained = [name for name, wanted in flags(policy).items() if wanted]
    assert trained
    assert all(f".{POLICY}." in name for name in trained)
    assert sum(f".{REFERENCE}." in name for name in flags(policy)) == len(trained)


def test_a_new_adapter_is_an_exact_no_op(groups):
    model = tiny("llama")
    model.set_attn_implementation(FLAT)
    before = score(Policy(model, EndTokenOnly(), flat=True), groups)
    dressed = Policy(adapters.add_policy_adapter(model, Lora(r=2)), EndTokenOnly(), flat=True)
    assert torch.equal(score(dressed, groups), before)


def test_at_the_start_policy_and_reference_agree_and_the_base_does_not(policy, groups):
    ours = score(policy, groups)
    with policy.acting_as(REFERENCE):
        assert torch.equal(score(policy, groups), ours)
    with policy.acting_as(None):
        base = score(policy, groups)
    assert (base - ours).abs().max() > 0.1
    plain = tiny("llama", torch.float64)
    plain.set_attn_implementation(FLAT)
    assert torch.allclose(base, score(Policy(plain, EndTokenOnly(), flat=True), groups), rtol=0, atol=1e-12)
    assert torch.equal(score(policy, groups), ours)


@pytest.mark.parametrize("other", [REFERENCE, None])
def test_selecting_never_touches_what_trains(policy, other):
    before = flags(policy)
    with policy.acting_as(other):
        assert flags(policy) == before
    assert flags(policy) == before


def test_pefts_own_selection_would_train_the_reference(policy):
    """Why `select` exists: peft's set_adapter changes requires_grad of every adapter."""
    policy.model.set_adapter(REFERENCE)
    trained = [name for name, wanted in flags(policy).items() if wanted]
    assert all(f".{REFERENCE}." in name for name in trained)
    assert trained


def test_the_reference_does_not_move_in_an_optimiser_step(policy, groups):
    frozen = adapters.adapter_state(policy.model, REFERENCE)
    with policy.acting_as(REFERENCE):
        before = score(policy, groups)
    found = gradient(policy, groups)
    assert found
    assert all(f".{POLICY}." in name for name in found)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer.step()
    assert all(torch.equal(x, frozen[k]) for k, x in adapters.adapter_state(policy.model, REFERENCE).items())
    with policy.acting_as(REFERENCE):
        assert torch.equal(score(policy, groups), before)
    assert not torch.equal(score(policy, groups), before)


def test_a_saved_state_is_a_copy(policy):
    state = adapters.adapter_state(policy.model, POLICY)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(1.0)
    moved = adapters.adapter_state(policy.model, POLICY)
    assert all(torch.allclose(moved[k], state[k] + 1) for k in state)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merging_writes_elsewhere(family, groups):
    policy = lora_policy(family)
    before, state = score(policy, groups), {k: v.clone() for k, v in policy.state_dict().items()}
    merged = merge.merged(policy.model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    found = score(Policy(merged, EndTokenOnly(), flat=True), groups)
    assert torch.allclose(found, before, rtol=0, atol=1e-6)
    assert all(torch.equal(v, state[k]) for k, v in policy.state_dict().items())
    assert torch.equal(score(policy, groups), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_changes_no_gradient(family, lora, groups):
    if lora:
        policy = lora_policy(family)
    else:
        model = tiny(family, torch.float64)
        model.set_attn_implementation(FLAT)
        policy = Policy(model, EndTokenOnly(), flat=True)
    policy.train()
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    layers = policy.causal_lm.base_model.h if family == "gpt2" else policy.causal_lm.base_model.layers
    calls = []
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradient(policy, groups)
    assert len(calls) == 1
    policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.causal_lm.enable_input_require_grads()
    calls.clear()
    checkpointed = gradient(policy, groups)
    assert len(calls) == 2, "nothing was recomputed"
    assert plain.keys() == checkpointed.keys()
    for name, expected in plain.items():
        assert torch.allclose(checkpointed[name], expected, rtol=1e-12, atol=1e-12), name


def test_switching_between_forward_and_backward_is_refused(policy, groups):
    logp = policy(policy.batch(groups)).logp_N
    score(policy, groups)  # a pass without gradient does not end the wait
    with pytest.raises(AssertionError, match="between a forward pass and its backward"), policy.acting_as(REFERENCE):
        pass
    logp.sum().backward()
    policy.backward_done()
    with policy.acting_as(REFERENCE):
        score(policy, groups)


def test_a_pass_with_gradient_under_another_adapter_is_refused(policy, groups):
    with pytest.raises(AssertionError, match="no_grad"), policy.acting_as(REFERENCE):
        policy(policy.batch(groups))


def test_the_policy_acts_again_after_an_error(policy, groups):
    before = score(policy, groups)
    with pytest.raises(KeyError), policy.acting_as(None):
        raise KeyError
    assert torch.equal(score(policy, groups), before)


def test_a_full_model_has_nothing_to_switch():
    with (
        pytest.raises(AssertionError, match="no adapter"),
        Policy(tiny("gpt2"), EndTokenOnly(), flat=False).acting_as(None),
    ):
        pass


def test_dropout_on_the_adapter_forbids_sharing_while_training():
    policy = lora_policy(dropout=0.1)
    assert policy.shares_prompts
    assert not policy.train().shares_prompts
    assert lora_policy().train().shares_prompts


def test_wrong_target_modules_name_what_there_is():
    with pytest.raises(ModelError, match="target_modules") as caught:
        adapters.add_policy_adapter(tiny("llama"), Lora(target_modules=["c_attn"]))
    assert "q_proj" in str(caught.value)
    assert "\n" not in str(caught.value)
