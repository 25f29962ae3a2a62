"""Layers in one operation each, products by oneDNN and attention in blocks give what a model's own forward gives."""

import copy

import pytest
import torch
from exactness import sample_groups
from families import FAMILIES, VOCABULARY, tiny
from peft import LoraConfig, get_peft_model
from stubs import policy_of
from tiny_folders import randomise
from torch import nn
from transformers.models.llama import modeling_llama

from rlpost.kernels import ops
from rlpost.kernels.build import why_none
from rlpost.policy import adapters, tile_attention, trunk, trunk_ops
from rlpost.policy.attention import FLAT
from rlpost.policy.check import probe_groups
from rlpost.policy.fast_layers import FastLinear, use_fast_linear
from rlpost.policy.fused import FusedModel
from rlpost.policy.layout import FlatLayout
from rlpost.policy.params import Lora
from rlpost.policy.products import adjacent
from rlpost.policy.recognise import NotRecognised
from rlpost.policy.tiles import Segment
from rlpost.policy.trunk import Trunk
from rlpost.policy.trunk_check import why_no_trunk
from rlpost.policy.trunk_ops import CompiledOps, TorchOps, layer_ops
from rlpost.types import Completion, Group

READ = ["llama", "qwen2", "qwen3", "mistral"]


def policy_for(family: str, dtype: torch.dtype = torch.float64, wide: bool = False):
    model = tiny(family, dtype, scale=4.0, wide=wide)
    model.set_attn_implementation(FLAT)
    policy = policy_of(model, None)
    policy.flat = True
    return policy


def widened(policy):
    """Without windows: those of the small configurations are shorter than the rows here."""
    for owner in (policy.causal_lm.config, *(layer.self_attn for layer in policy.causal_lm.model.layers)):
        if getattr(owner, "sliding_window", None) is not None:
            owner.sliding_window = 4096
    return policy


def long_groups():
    """Rows of several blocks of queries, and prompts of unlike lengths in one tile."""
    generator = torch.Generator().manual_seed(2)

    def draw(n):
        return tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist())

    shapes = [(40, (70, 75)), (33, (72, 66, 80)), (20, (90,))]
    return [Group(draw(p), tuple(Completion(draw(n), (True,) * n) for n in ns)) for p, ns in shapes]


@torch.no_grad()
def shaken(module):
    generator = torch.Generator().manual_seed(3)
    for p in module.parameters():
        if p.ndim == 1:
            p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator)).add_(0.05)
    return module


def both(policy, groups):
    """States and gradients of all parameters, by the model's own forward and by one operation a layer."""
    found = []
    for fast in (False, True):
        policy.trunk = policy.blocks = fast
        policy.model.zero_grad()
        states = policy._hidden(policy.batch(groups))
        cotangent = torch.randn(states.shape, dtype=states.dtype, generator=torch.Generator().manual_seed(0))
        (states * cotangent).sum().backward()
        grads = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
        found.append({"states": states.detach(), **grads})
    return found


def assert_same(own, other, tolerance):
    assert own.keys() == other.keys()
    for name, x in own.items():
        assert (x - other[name]).abs().max() <= tolerance * x.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_are_read_in_one_operation_a_layer(family):
    policy = policy_for(family, torch.float32)
    if family in READ:
        widened(policy)
    assert (not why_no_trunk(policy, probe_groups(VOCABULARY, 128))) == (family in READ)


@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("groups", [sample_groups(VOCABULARY), long_groups()], ids=["shapes", "long"])
def test_states_and_gradients_are_those_of_the_models_own_forward(family, groups):
    policy = widened(policy_for(family))
    shaken(policy.model)
    assert Trunk(policy.causal_lm).serves(policy.batch(groups).passes[0].layout)
    # A transformers norm and its rotary angles are float32 even in a float64 model.
    assert_same(*both(policy, groups), 1e-5)


def in_float32(family):
    policy = widened(policy_for(family, torch.float32, wide=True))
    shaken(policy.model)
    return policy


compiled = pytest.mark.skipif(bool(why_none()), reason=f"no compiled functions here: {why_none()}")


@compiled
@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("groups", [sample_groups(VOCABULARY), long_groups()], ids=["shapes", "long"])
def test_compiled_layers_are_the_models_own(family, groups):
    policy = in_float32(family)
    assert isinstance(Trunk(policy.causal_lm)._ops, CompiledOps)
    assert_same(*both(policy, groups), 2e-4)


@compiled
@pytest.mark.parametrize("family", READ)
def test_compiled_layers_in_bfloat16_pass_the_check_that_notices_a_wrong_one(family, monkeypatch):
    policy = in_float32(family)
    policy.in_bfloat16 = True
    groups = probe_groups(VOCABULARY, 128)
    assert not why_no_trunk(policy, groups)
    assert policy.in_bfloat16
    swiglu = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda x: swiglu(x) * (1.5 if x.dtype == torch.bfloat16 else 1.0))
    assert "differs" in why_no_trunk(policy, groups)


@compiled
def test_a_base_in_bfloat16_under_adapters_is_compiled_and_left_as_it_was():
    policy = in_float32("llama")
    policy.model = adapters.add_policy_adapter(policy.model.bfloat16(), Lora(r=2, alpha=4.0))
    policy.in_bfloat16 = True
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    assert not why_no_trunk(policy, probe_groups(VOCABULARY, 128))
    for name, p in policy.model.named_parameters():
        assert p.dtype == before[name].dtype
        assert torch.equal(p, before[name])


def test_without_a_compiler_layers_are_the_models_own_too(monkeypatch):
    monkeypatch.setattr(trunk_ops, "why_none", lambda: "none here")
    policy = in_float32("qwen3")
    assert isinstance(Trunk(policy.causal_lm)._ops, TorchOps)
    assert_same(*both(policy, long_groups()), 2e-4)
    policy.in_bfloat16 = True
    assert not why_no_trunk(policy, probe_groups(VOCABULARY, 128))


def test_widths_that_are_no_multiples_of_lanes_are_not_compiled():
    assert isinstance(layer_ops(torch.float32, [32, 40], False), TorchOps)
    assert isinstance(layer_ops(torch.float64, [32, 48], False), TorchOps)


@compiled
def test_compiled_attention_has_no_longest_row():
    policy = in_float32("llama")
    rows = FlatLayout([Segment(0, 5000)], 5000)
    assert Trunk(policy.causal_lm).serves(rows)
    assert not Trunk(policy.causal_lm.double()).serves(rows)


def test_weights_are_recomputed_where_they_are_not_kept(monkeypatch):
    policy = policy_for("llama")
    monkeypatch.setattr(tile_attention, "KEPT_KEYS", 30)
    assert_same(*both(policy, long_groups()), 1e-5)


def test_a_window_within_the_rows_is_left_to_the_models_own_forward():
    policy = policy_for("mistral")
    batch = policy.batch(long_groups())
    assert batch.passes[0].layout.longest > policy.causal_lm.config.sliding_window
    assert not Trunk(policy.causal_lm).serves(batch.passes[0].layout)
    assert_same(*both(policy, long_groups()), 1e-9)


def test_active_adapters_are_added_and_only_they_are_trained():
    policy = widened(policy_for("qwen2"))
    policy.model = adapters.add_policy_adapter(policy.model, Lora(r=2, alpha=4.0)).double()
    bare = both(policy, sample_groups(VOCABULARY))[1]["states"]
    randomise(policy.model)
    adapters.add_adapter(policy.model, adapters.REFERENCE, adapters.adapter_state(policy.model, adapters.POLICY))
    own, other = both(policy, sample_groups(VOCABULARY))
    assert not torch.allclose(own["states"], bare, atol=1e-2)
    assert {n.split(".")[-2] for n in other if n != "states"} == {adapters.POLICY}
    assert_same(own, other, 1e-5)
    with policy.acting_as(None), torch.no_grad():
        assert torch.allclose(policy._hidden(policy.batch(sample_groups(VOCABULARY))), bare, atol=1e-6)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_adapters_that_are_more_than_two_matrices_are_left_to_peft(options):
    model = tiny("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options), adapter_name="policy")
    with pytest.raises(NotRecognised):
        Trunk(model)


def test_dropout_of_an_adapter_counts_while_it_trains_only():
    policy = policy_for("llama", torch.float32)
    policy.model = adapters.add_policy_adapter(policy.model, Lora(r=2, alpha=4.0, dropout=0.5))
    for training in (True, False):
        policy.train(training)
        assert not why_no_trunk(policy, probe_groups(VOCABULARY, 128))
        assert policy.training == training
        policy.trunk = True
        assert (policy.written_out() is None) == training


def test_a_layer_derived_from_a_linear_one_is_not_read_as_one():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    policy = policy_for("llama", torch.float32)
    policy.causal_lm.model.layers[0].mlp.up_proj.__class__ = Scaled
    for read in (Trunk, FusedModel):
        with pytest.raises(NotRecognised, match="Scaled"):
            read(policy.causal_lm)


def test_another_activation_is_noticed():
    policy = policy_for("llama", torch.float32)
    for layer in policy.causal_lm.model.layers:
        layer.mlp.act_fn = nn.GELU()
    assert "differs" in why_no_trunk(policy, probe_groups(VOCABULARY, 128))


def test_a_parameter_that_would_be_ignored_is_noticed(monkeypatch):
    policy = policy_for("llama", torch.float32)
    own = modeling_llama.LlamaDecoderLayer.forward
    scale = nn.Parameter(torch.ones(1))
    policy.causal_lm.model.layers[0].scale = scale
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda self, x, **more: own(self, x + 0 * scale, **more)
    )
    assert "missing" in why_no_trunk(policy, probe_groups(VOCABULARY, 128))


def test_the_check_leaves_weights_and_what_is_trained_as_they_were():
    policy = widened(policy_for("qwen3", torch.float32))
    policy.model.requires_grad_(False)
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    assert not why_no_trunk(policy, probe_groups(VOCABULARY, 128))
    assert not policy.trunk
    assert all(torch.equal(before[n], p) and not p.requires_grad for n, p in policy.model.named_parameters())


def test_joined_weights_are_views_that_training_and_saving_see(tmp_path):
    policy = policy_for("llama", torch.float32)
    attention = policy.causal_lm.model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    expected = torch.cat([w.detach().clone() for w in weights])
    first = adjacent(weights)
    assert torch.equal(first, expected)
    assert adjacent(weights).data_ptr() == first.data_ptr() == weights[0].data_ptr()
    with torch.no_grad():
        weights[1].add_(1.0)
    assert torch.equal(adjacent(weights), torch.cat([w.detach() for w in weights]))
    policy.causal_lm.save_pretrained(tmp_path)
    saved = type(policy.causal_lm).from_pretrained(tmp_path)
    assert all(torch.equal(p, dict(saved.named_parameters())[n]) for n, p in policy.causal_lm.named_parameters())
    twin = copy.deepcopy(policy.causal_lm)
    with torch.no_grad():
        weights[0].zero_()
    assert twin.model.layers[0].self_attn.q_proj.weight.any()


def test_one_weight_in_two_places_is_joined_right():
    w = nn.Parameter(torch.randn(3, 4))
    other = nn.Parameter(torch.randn(2, 4))
    for _ in range(2):
        assert torch.equal(adjacent([w, other, w]), torch.cat([w.detach(), other.detach(), w.detach()]))


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_by_onednn_are_linear_layers(bias, monkeypatch):
    own = nn.Linear(24, 40, bias=bias)
    fast = copy.deepcopy(own)
    for preferred, kind in ((False, nn.Linear), (True, FastLinear)):
        monkeypatch.setattr("rlpost.policy.fast_layers.prefers_onednn", lambda found=preferred: found)
        use_fast_linear(fast)
        assert type(fast) is kind
    for shape in ((7, 24), (2, 3, 24), (0, 24)):
        x = torch.randn(shape, requires_grad=True)
        y = torch.randn(*shape[:-1], 40)
        grads = []
        for layer in (own, fast):
            out = layer(x)
            grads.append((out, *torch.autograd.grad((out * y).sum(), [x, *layer.parameters()])))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*grads, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.randn(2, 24)).dtype == torch.bfloat16
    assert torch.equal(fast.double()(x.double()), own.double()(x.double()))


def test_in_bfloat16_it_differs_from_float32_by_rounding_alone():
    policy = policy_for("llama", torch.float32)
    groups = sample_groups(VOCABULARY)
    exact = both(policy, groups)[0]
    policy.in_bfloat16 = True
    with policy.precision():
        own, other = both(policy, groups)
    for name in exact:
        rounding = (own[name].float() - exact[name]).norm()
        assert 0 < (other[name] - exact[name]).norm() < 2 * rounding, name


def test_layers_that_do_not_run_in_one_operation_keep_their_own_forward(monkeypatch):
    def fails(*_):
        raise RuntimeError("sizes")

    policy = policy_for("llama", torch.float32)
    monkeypatch.setattr(trunk, "forward", fails)
    assert "do not run" in why_no_trunk(policy, probe_groups(VOCABULARY, 128))
    assert not policy.trunk
