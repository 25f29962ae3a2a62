"""Models of scalars: where their numbers are read, what trains with them and what does not, and that they are saved."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from families import EndTokenOnly, tiny
from test_adapters import lora_policy
from tiny_folders import randomise, save
from torch import Tensor

from rlpost.errors import ModelError
from rlpost.policy import adapters
from rlpost.policy.adapters import CRITIC, POLICY
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.policy.policy import Policy
from rlpost.policy.value_head import HEAD_FILE, ValueHeadModel, Values, load_value_head_model, make_critic
from rlpost.stages.context import save_policy
from rlpost.types import Completion, Group, completions

LORA = Model(lora=Lora(r=2, alpha=4.0))


def expected(model: ValueHeadModel, groups: list[Group]) -> Values:
    """One unpadded row a completion, through transformers' own forward and the head by hand."""
    plain = model.trunk.causal_lm.base_model
    before, after, final = [], [], []
    for group in groups:
        for c in group.completions:
            hidden = plain(torch.tensor([[*group.prompt, *c.ids]]), use_cache=False).last_hidden_state[0]
            value = hidden @ model.head.weight[0] + model.head.bias
            at = [len(group.prompt) + i for i, acted in enumerate(c.action) if acted]
            before += [value[i - 1] for i in at]
            after += [value[i] for i in at]
            final.append(value[-1])
    return Values(torch.stack(before), torch.stack(after), torch.stack(final))


def with_head(policy: Policy, adapter: str = POLICY, **options) -> ValueHeadModel:
    """A model whose head says something."""
    model = ValueHeadModel(policy, adapter, **options)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(3)))
        model.head.bias.fill_(0.5)
    return model


def total(values: Values) -> Tensor:
    """Some number that every value moves."""
    return values.before_N.square().sum() + values.after_N.sum() + (3 * values.final_S).sin().sum()


def step(model: ValueHeadModel, groups: list[Group]) -> dict[str, Tensor]:
    """One step of gradient descent; returns the gradients."""
    trained = model.trained()
    total(model(model.batch(groups))).backward()
    model.backward_done()
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    with torch.no_grad():
        for p in trained.values():
            p -= 0.01 * p.grad
            p.grad = None
    return gradients


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_are_of_the_states_before_and_after_each_action_and_at_the_end(groups, family, flat):
    model = tiny(family, torch.float64)
    use_attention(model, "eager")
    scalar = with_head(Policy(model, EndTokenOnly(), flat=flat).eval())
    with torch.no_grad():
        wanted = expected(scalar, groups)
        use_attention(model, FLAT if flat else "sdpa")
        found = scalar(scalar.batch(groups))
    # Rotations and norms of Llama compute in float32.
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12 if family == "gpt2" else 1e-5)
    assert len(found.final_S) == len(completions(groups))


def test_scores_do_not_depend_on_the_budget_of_a_pass(groups):
    scalar = with_head(lora_policy())
    for few, many in zip(scalar.score(groups, budget=1), scalar.score(groups), strict=True):
        assert torch.allclose(few, many, rtol=0, atol=1e-6)


def test_a_new_head_says_next_to_nothing(groups):
    scalar = ValueHeadModel(lora_policy())
    assert scalar.head.weight.dtype == torch.float64
    assert float(scalar.score(groups).final_S.abs().max()) < 3
    assert float(scalar.head.bias.detach()) == 0.0


def test_with_full_fine_tuning_all_but_the_layer_of_logits_trains(groups):
    model = tiny("llama")
    use_attention(model, FLAT)
    scalar = with_head(Policy(model, EndTokenOnly(), flat=True))
    gradients = step(scalar, groups)
    assert not any("lm_head" in name for name in gradients)
    assert {"head.weight", "head.bias"} < set(gradients)
    assert all(bool(g.any()) for g in gradients.values())
    tied = tiny("gpt2")
    use_attention(tied, FLAT)
    assert any("wte" in name for name in ValueHeadModel(Policy(tied, EndTokenOnly(), flat=True)).trained())


def test_a_second_adapter_trains_without_the_policy_or_the_base_moving(groups):
    policy = lora_policy()
    adapters.add_adapter(policy.model, CRITIC, adapters.adapter_state(policy.model, POLICY), trainable=True)
    critic = with_head(policy, CRITIC)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    with torch.no_grad():
        logp_N = policy(policy.batch(groups)).logp_N
    gradients = step(critic, groups)
    assert all(f".{CRITIC}." in name or name.startswith("head.") for name in gradients)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(f".{CRITIC}." in name for name in moved)
    assert set(policy.trained()) == {n for n in before if f".{POLICY}." in n}
    with torch.no_grad():
        assert torch.equal(policy(policy.batch(groups)).logp_N, logp_N)


def test_the_other_adapter_acts_although_the_policys_is_selected(groups):
    policy = lora_policy()
    same = adapters.adapter_state(policy.model, POLICY)
    adapters.add_adapter(policy.model, CRITIC, {name: 2 * x for name, x in same.items()})
    own, other = with_head(policy).score(groups), with_head(policy, CRITIC).score(groups)
    assert float((own.final_S - other.final_S).abs().max()) > 0.1


def test_a_frozen_trunk_trains_the_head_alone(groups):
    policy = lora_policy()
    head = with_head(policy, trains_trunk=False)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    assert set(step(head, groups)) == {"head.weight", "head.bias"}
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


@pytest.mark.parametrize("shared", [False, True], ids=["own", "beside the policy"])
def test_gradient_checkpointing_changes_no_gradient(groups, shared):
    policy = lora_policy()
    if shared:
        adapters.add_adapter(policy.model, CRITIC, adapters.adapter_state(policy.model, POLICY), trainable=True)
    other = deepcopy(policy)
    other.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    other.causal_lm.enable_input_require_grads()
    adapter = CRITIC if shared else POLICY
    one, two = with_head(policy, adapter).train(), with_head(other, adapter).train()
    plain, checkpointed = step(one, groups), step(two, groups)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-9, atol=1e-12), name
        assert bool(gradient.any()), name


# --- Saved and loaded


@pytest.fixture
def adapter_checkpoint(tmp_path, llama_folder) -> Path:
    """A reward model that is an adapter on the Llama folder."""
    policy = load_policy(llama_folder, LORA)
    randomise(policy.model)
    folder = tmp_path / "reward"
    folder.mkdir()
    policy.model.peft_config[POLICY].base_model_name_or_path = str(llama_folder)
    save_policy(policy, folder)
    with_head(policy).save(folder)
    return folder


def load(folder: Path, settings: Model = LORA, share_with: Policy | None = None) -> ValueHeadModel:
    return load_value_head_model(folder, settings, share_with=share_with, bfloat16=False, device="cpu")


def test_a_full_model_comes_back_as_it_was(groups, tmp_path):
    saved = save(tmp_path / "model", tiny("gpt2"))
    scalar = with_head(load_policy(saved, Model()))
    scalar.save(saved)
    found = load(saved, Model())
    for one, other in zip(found.score(groups), scalar.score(groups), strict=True):
        assert torch.equal(one, other)
    assert not any(p.requires_grad for p in [*found.parameters(), *found.trunk.parameters()])


def test_on_a_shared_base_it_scores_as_by_itself(groups, llama_folder, adapter_checkpoint):
    policy = load_policy(llama_folder, LORA)
    trained = set(policy.trained())
    apart, shared = load(adapter_checkpoint), load(adapter_checkpoint, share_with=policy)
    assert apart.trunk is not policy
    assert shared.trunk is policy
    for one, other in zip(shared.score(groups), apart.score(groups), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert set(policy.trained()) == trained
    assert all(p.requires_grad for p in policy.trained().values())
    assert float(policy(policy.batch(groups)).logp_N.detach().abs().sum()) > 0


def test_the_policys_training_leaves_a_judge_on_its_base_alone(groups, llama_folder, adapter_checkpoint):
    policy = load_policy(llama_folder, LORA)
    judge = load(adapter_checkpoint, share_with=policy)
    before = judge.score(groups).final_S
    policy(policy.batch(groups)).logp_N.sum().backward()
    policy.backward_done()
    with torch.no_grad():
        for p in policy.trained().values():
            assert p.grad is not None
            p -= p.grad.sign()
    assert torch.equal(judge.score(groups).final_S, before)


def test_on_another_base_it_is_loaded_by_itself(groups, gpt2_folder, adapter_checkpoint):
    policy = load_policy(gpt2_folder, LORA)
    assert load(adapter_checkpoint, share_with=policy).trunk is not policy


def test_a_critic_can_begin_as_a_reward_model(groups, llama_folder, adapter_checkpoint):
    policy = load_policy(llama_folder, LORA)
    critic = make_critic(policy, llama_folder, adapter_checkpoint, LORA, trains_trunk=True)
    assert critic.trunk is policy
    assert torch.allclose(critic.score(groups).final_S, load(adapter_checkpoint).score(groups).final_S, atol=1e-6)
    assert len(critic.trained()) == len(policy.trained()) + 2


def test_a_folder_without_a_head_is_no_reward_model(llama_folder, adapter_folder):
    with pytest.raises(ModelError, match=rf"{llama_folder}: no reward model or critic.*{HEAD_FILE}"):
        load(llama_folder, Model())
    with pytest.raises(ModelError, match=rf"{adapter_folder}: no reward model"):
        load(adapter_folder, share_with=load_policy(llama_folder, LORA))


def test_a_head_of_another_width_is_refused(tmp_path):
    folder = save(tmp_path / "model", tiny("gpt2"))
    scalar = with_head(load_policy(folder, Model()))
    scalar.head = torch.nn.Linear(7, 1)
    scalar.save(folder)
    with pytest.raises(ModelError, match="its head reads 7 numbers a state but the model gives 32"):
        load(folder, Model())


def test_a_head_alone_takes_no_gradient_through_its_trunk():
    policy = Policy(tiny("gpt2"), EndTokenOnly(), flat=False)
    model = with_head(policy, trains_trunk=False)
    said = model(model.batch([Group((1, 2), (Completion((5, 6), (True, True)),))]))
    said.before_N.sum().backward()
    assert all(p.grad is None for p in policy.parameters())
    assert model.head.weight.grad is not None
