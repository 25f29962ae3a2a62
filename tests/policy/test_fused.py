"""The fused decoding step gives the logits of the model's own forward, or is not used."""

import pytest
import torch
from exactness import sample_groups
from families import FAMILIES, VOCABULARY, EndTokenOnly, tiny
from peft import LoraConfig, get_peft_model
from stubs import tiny_policy
from tiny_folders import randomise
from transformers.models.qwen3 import modeling_qwen3

from rlpost.engine.local import LocalEngine
from rlpost.engine.params import Sampling
from rlpost.kernels.build import why_none
from rlpost.policy import adapters, fused, fused_blocks, fused_check
from rlpost.policy.attention import FLAT
from rlpost.policy.check import check_exactness, probe_groups
from rlpost.policy.decoders import FlatDecoder
from rlpost.policy.fused import FusedModel
from rlpost.policy.fused_blocks import CompiledStep, TorchStep
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.policy.recognise import NotRecognised
from rlpost.policy.trunk import Trunk
from rlpost.types import Request

FUSED = ["llama", "qwen2", "qwen3", "mistral"]
PROMPTS = [[5, 9, 2, 7, 11, 3, 3, 8, 20, 1], [4, 4, 6], [30, 31, 32, 33, 34]]
PROMPT_OF_ROW = [0, 0, 0, 1, 2, 2]


def flat(family: str, dtype: torch.dtype = torch.float64, scale: float = 6.0, wide: bool = False):
    model = tiny(family, dtype, scale=scale, wide=wide)
    model.set_attn_implementation(FLAT)
    return model.eval()


@torch.no_grad()
def shaken(model, seed: int = 3):
    """The model with other weights, those of norms included."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
    return model


@torch.no_grad()
def decoded(model, packed, steps: int = 20, trunk=None):
    """[logits of each step] over rows that leave twice, one of them the last of its prompt."""
    decoder = FlatDecoder(model, PROMPTS, PROMPT_OF_ROW, steps, fused=packed, trunk=trunk)
    first = decoder.start()
    generator = torch.Generator().manual_seed(1)
    rows, found = len(PROMPT_OF_ROW), [first]
    for t in range(steps):
        found.append(decoder.step(torch.randint(0, VOCABULARY, (rows,), generator=generator)))
        if t in (4, 12):
            stay = torch.tensor([i for i in range(rows) if i != 1] if t == 4 else [0, 1, 3, 4])
            decoder.keep(stay)
            rows = len(stay)
    return torch.cat([x.flatten() for x in found])


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_are_fused(family):
    exact = check_exactness(tiny(family), EndTokenOnly())
    assert exact.fused == (family in FUSED)
    assert bool(exact.fused_reason) != exact.fused


@pytest.mark.parametrize("family", FUSED)
def test_logits_are_those_of_the_models_own_forward(family):
    model = shaken(flat(family))
    assert torch.allclose(decoded(model, FusedModel(model)), decoded(model, None), rtol=0, atol=1e-5)


compiled = pytest.mark.skipif(bool(why_none()), reason=f"no compiled functions here: {why_none()}")


@compiled
@pytest.mark.parametrize("family", FUSED)
def test_compiled_steps_are_the_models_own_forward(family):
    model = shaken(flat(family, torch.float32, scale=3.0, wide=True))
    fused = FusedModel(model)
    assert isinstance(fused._step, CompiledStep)
    assert torch.allclose(decoded(model, fused), decoded(model, None), rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FUSED)
def test_prompts_read_by_written_out_layers_are_cached_as_by_the_models_own_forward(family):
    model = shaken(flat(family))
    for owner in (model.config, *(layer.self_attn for layer in model.model.layers)):
        if getattr(owner, "sliding_window", None) is not None:
            owner.sliding_window = 4096
    assert torch.allclose(decoded(model, None, trunk=Trunk(model)), decoded(model, None), rtol=0, atol=1e-5)


def test_without_a_compiler_steps_are_the_models_own_forward_too(monkeypatch):
    monkeypatch.setattr(fused_blocks, "why_none", lambda: "none here")
    model = shaken(flat("qwen3", torch.float32, scale=3.0, wide=True))
    fused = FusedModel(model)
    assert isinstance(fused._step, TorchStep)
    assert torch.allclose(decoded(model, fused), decoded(model, None), rtol=0, atol=2e-4)


def test_the_check_leaves_the_weights_as_they_were():
    model = flat("qwen3", torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert not fused_check.why_not_fused(model, probe_groups(VOCABULARY, 128))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@torch.no_grad()
def test_head_norms_behind_the_rotation_are_noticed_though_new_ones_are_all_ones(monkeypatch):
    """With weights of one, a norm before and a norm after the rotation are the same."""
    rotated = modeling_qwen3.apply_rotary_pos_emb

    class Late(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x):
            return x

    model = flat("qwen3", torch.float32)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_norm, attention.k_norm = Late(attention.q_norm), Late(attention.k_norm)
    norms = iter(())

    def late(q, k, cos, sin, *_, **__):
        nonlocal norms
        pair = next(norms, None)
        if pair is None:
            norms = iter([(a.self_attn.q_norm, a.self_attn.k_norm) for a in model.model.layers])
            pair = next(norms)
        q, k = rotated(q, k, cos, sin)
        return tuple(
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + n.variance_epsilon) * n.weight
            for x, n in zip((q, k), pair, strict=True)
        )

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", late)
    assert "differs" in fused_check.why_not_fused(model, probe_groups(VOCABULARY, 128))


def test_an_adapter_is_in_the_packed_weights():
    model = flat("llama")
    dressed = adapters.add_policy_adapter(model, Lora(r=2, alpha=4.0)).double()
    bare = decoded(model, FusedModel(dressed))
    randomise(dressed)
    adapters.add_adapter(dressed, adapters.REFERENCE, adapters.adapter_state(dressed, adapters.POLICY))
    own = decoded(model, None)
    assert not torch.allclose(own, bare, atol=1e-2)
    assert torch.allclose(decoded(model, FusedModel(dressed)), own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}, {"trainable_token_indices": [1]}],
    ids=str,
)
def test_what_an_adapter_has_beyond_low_ranks_is_not_ignored(options):
    model = flat("llama", torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options)
    with pytest.raises(NotRecognised):
        FusedModel(get_peft_model(model, config, adapter_name=adapters.POLICY))


def test_what_would_be_ignored_is_refused():
    hooked = flat("llama", torch.float32)
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    scaled = flat("llama", torch.float32)
    scaled.model.layers[1].scale = torch.nn.Parameter(torch.ones(()))
    buffered = flat("llama", torch.float32)
    buffered.model.layers[1].register_buffer("scale", torch.ones(()))
    for model, what in ((hooked, "hook"), (scaled, r"layers\.1\.scale"), (buffered, "buffer")):
        with pytest.raises(NotRecognised, match=what):
            FusedModel(model)


def test_a_model_too_large_for_a_second_copy_is_not_packed(monkeypatch):
    monkeypatch.setattr(fused, "LARGEST", 1000)
    with pytest.raises(NotRecognised, match="second copy"):
        FusedModel(flat("llama", torch.float32))


SAMPLING = Sampling(max_new_tokens=12)


def requests():
    return [Request(g.prompt, 3, SAMPLING, 7 + i) for i, g in enumerate(sample_groups(VOCABULARY)[:2])]


def engine(policy: Policy, **options) -> LocalEngine:
    policy.fused = True
    found = LocalEngine(policy, **options)
    found.update_weights(policy, 0)
    return found


def ids(sampled) -> list[list[int]]:
    return [c.ids.tolist() for some in sampled for c in some]


def test_the_engine_draws_the_same_tokens_and_can_be_told_not_to():
    policy = tiny_policy("llama", eos=3)
    own = engine(policy, fused=False)
    expected = own.generate(requests())
    assert own._fused is None
    packed = engine(policy)
    assert ids(packed.generate(requests())) == ids(expected)
    assert packed._fused is not None


def test_new_weights_are_packed_anew():
    policy = tiny_policy("llama", eos=3)
    packed = engine(policy)
    first = ids(packed.generate(requests()))
    shaken(policy.model)
    packed.update_weights(policy, 1)
    second = ids(packed.generate(requests()))
    assert second != first
    assert second == ids(engine(policy, fused=False).generate(requests()))


def test_large_weights_are_not_kept_while_the_model_learns(monkeypatch):
    monkeypatch.setattr("rlpost.engine.local.KEPT_BYTES", 10)
    packed = engine(tiny_policy("llama", eos=3))
    packed.generate(requests())
    assert packed._fused is None


def test_in_bfloat16_it_differs_from_float32_by_rounding_alone():
    model = flat("llama", torch.float32, scale=1.0)
    own = decoded(model, None)
    with torch.autocast("cpu", torch.bfloat16):
        packed, plain = decoded(model, FusedModel(model, bfloat16=True)).float(), decoded(model, None).float()
    rounding = (plain - own).abs().mean()
    assert 0 < (packed - own).abs().mean() < 2 * rounding
