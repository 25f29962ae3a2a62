"""A base in four bits under an adapter (QLoRA): trained, saved, gone on with, merged, beside transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_made import EVERYTHING, GROUPS, alone, base_model, gap, shaken, transformers_alone
from chains import same_after_interruptions
from peft import PeftModel
from test_lora_kinds import by_its_own_forward, sampled, settings
from tiny_recipes import PAIRS, SFT, prepared, run
from tiny_world import save_model, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlpost.errors import ModelError
from rlpost.inference.merge import merge_checkpoint
from rlpost.pipeline import dry_run
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model, Quantization
from rlpost.policy.policy import Policy
from rlpost.policy.quantized import FILE, NF4
from rlpost.policy.reference import reference_policy
from rlpost.policy.saved import save_policy
from rlpost.policy.score import logprobs

pytestmark = pytest.mark.extras

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both ends": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


def qlora(base: Path, **fields: Any) -> Model:
    return settings(base, **fields).model_copy(update={"quantization": Quantization.nf4})


def four_bits_alone(base: Path) -> Any:
    """The base as transformers quantises it; training mode keeps bitsandbytes from products in bfloat16."""
    config = BitsAndBytesConfig(**NF4)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config).train()


def packed(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p for n, p in policy.model.named_parameters() if p.dtype == torch.uint8}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_right_from_the_first_step_to_the_merged_model(here: Path, kind: str, tied: bool) -> None:
    base = base_model(here, tied)
    recipe = qlora(base, **KINDS[kind])
    policy = load_policy(base, recipe)
    assert len(packed(policy)) == 14, "two layers of seven products"
    codes = {name: p.clone() for name, p in packed(policy).items()}
    bare = alone(four_bits_alone(base))
    assert gap(bare, alone(transformers_alone(base))) > 0.01, "nothing was rounded"
    reference = reference_policy(policy, base, base, recipe)
    start = logprobs(policy, GROUPS)
    assert torch.equal(reference.logprobs(GROUPS), start)
    assert gap(start, bare) < 1e-5

    shaken(list(policy.trained().values()), 6, 0.05)
    policy(policy.batch(GROUPS)).logp_N.sum().backward()
    policy.backward_done()
    got = {n for n, p in policy.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert got == set(policy.trained())
    moved = logprobs(policy, GROUPS)
    assert gap(moved, start) > 0.05
    assert torch.equal(reference.logprobs(GROUPS), start), "the reference followed the policy"
    assert not policy.trunk
    assert not policy.fused
    assert gap(by_its_own_forward(policy, GROUPS), moved) < 1e-5
    groups, at_sampling = sampled(policy)
    assert gap(logprobs(policy, groups), at_sampling) < 1e-5
    assert all(torch.equal(p, codes[name]) for name, p in packed(policy).items())

    save_policy(policy, here / "saved")
    assert BitsAndBytesConfig(**json.loads((here / "saved" / FILE).read_text("utf-8"))).load_in_4bit
    assert gap(alone(PeftModel.from_pretrained(four_bits_alone(base), here / "saved")), moved) < 1e-5
    assert torch.equal(logprobs(load_policy(here / "saved", recipe), GROUPS), moved)
    assert torch.equal(logprobs(load_policy(here / "saved", EVERYTHING, trainable=False), GROUPS), moved)
    full = load_policy(here / "saved", EVERYTHING)
    assert not packed(full)
    assert all(p.requires_grad for p in full.parameters())
    assert gap(logprobs(full, GROUPS), moved) < 1e-5
    assert torch.equal(logprobs(policy, GROUPS), moved), "merging changed the policy"


def test_gradients_are_those_of_the_dequantised_model(here: Path) -> None:
    """The merged model of an adapter that does nothing is the base in float32: its adapter has the same gradients."""
    base = base_model(here)
    policy = load_policy(base, qlora(base))
    save_policy(policy, here / "nothing")
    wide = load_policy(here / "nothing", EVERYTHING)
    save_policy(wide, here / "wide")
    other = load_policy(here / "wide", settings(here / "wide").model_copy(update={"fast": False}))
    for one, its in zip(policy.trained().values(), other.trained().values(), strict=True):
        its.data.copy_(one.data)
    for model in (policy, other):
        shaken(list(model.trained().values()), 6, 0.05)
        model(model.batch(GROUPS)).logp_N.square().sum().backward()
    for (name, one), its in zip(policy.trained().items(), other.trained().values(), strict=True):
        assert torch.allclose(one.grad, its.grad, rtol=1e-3, atol=1e-4), name


def test_the_same_codes_under_every_precision(here: Path) -> None:
    base = base_model(here)
    one = load_policy(base, qlora(base))
    half = load_policy(base, qlora(base).model_copy(update={"gradient_checkpointing": True}), bfloat16=True)
    assert all(torch.equal(p, packed(half)[name]) for name, p in packed(one).items())
    assert half.causal_lm.get_input_embeddings().weight.dtype == torch.bfloat16
    assert gap(logprobs(half, GROUPS), logprobs(one, GROUPS)) < 0.05
    half.train()(half.batch(GROUPS)).logp_N.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in half.trained().values())


def test_no_products_in_bfloat16_without_gradient(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes has such ones for processors with AVX512-BF16: scores would not be those that are trained."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", lambda *_: pytest.fail("weights are packed anew"))
    base = base_model(here)
    policy = load_policy(base, qlora(base))
    with torch.enable_grad():
        trained = policy(policy.batch(GROUPS)).logp_N.detach()
    policy.backward_done()
    assert torch.equal(logprobs(policy, GROUPS), trained)


def test_weights_take_a_quarter_and_less(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tiny_model(hidden_size=256, intermediate_size=704, num_hidden_layers=4, tie_word_embeddings=True)
    base = save_model(here / "wide", wide)
    policy = load_policy(base, qlora(base))
    linear = [m for m in wide.modules() if isinstance(m, nn.Linear) and m is not wide.lm_head]
    rest = sum(p.numel() for p in wide.parameters()) - sum(m.weight.numel() for m in linear)
    # Half a byte a weight, one for the scale of 64, and four for that of 256 such scales.
    bits = sum(m.weight.numel() // 2 + m.weight.numel() // 64 + 4 * -(-m.weight.numel() // 64 // 256) for m in linear)
    stored = 4 * sum(p.numel() for p in wide.parameters())
    said = capsys.readouterr().err
    assert (
        f"its weights take {(4 * rest + bits) / 2**20:.1f} MiB in nf4, and {stored / 2**20:.1f} MiB as stored" in said
    )
    assert bits < stored / 7
    assert sum(p.numel() for p in packed(policy).values()) == sum(m.weight.numel() for m in linear) // 2


@pytest.mark.parametrize("model", ["gpt2", "modules"])
def test_what_cannot_be_quantised_or_trained_is_refused(here: Path, model: str) -> None:
    if model == "gpt2":
        base = save_model(here / "base", tiny_model("gpt2"))
        with pytest.raises(ModelError, match=r"model\.quantization: GPT2LMHeadModel in .* has no linear layers"):
            load_policy(base, qlora(base))
        return
    base = base_model(here)
    with pytest.raises(ModelError, match="the weights of down_proj are in four bits"):
        load_policy(base, qlora(base, modules_to_save=["down_proj"]))


LORA = ("model.lora={r: 4, alpha: 8}", "model.quantization=nf4")


def test_a_result_is_merged_into_an_ordinary_model(tmp_path: Path) -> None:
    (line,) = [x for x in dry_run(prepared(tmp_path, {"sft": SFT}, *LORA)) if "training" in x]
    assert line.endswith("training LoRA r=4 on weights in nf4")
    result = run(tmp_path, {"sft": SFT, "pairs": PAIRS}, *LORA)
    policy = load_policy(result, EVERYTHING, trainable=False)
    assert packed(policy)
    merged = load_policy(merge_checkpoint(str(result), str(tmp_path / "merged")), EVERYTHING)
    assert gap(logprobs(merged, policy_groups(policy)), logprobs(policy, policy_groups(policy))) < 1e-4


def policy_groups(policy: Policy) -> list[Any]:
    from rlpost.policy.check import probe_groups

    return probe_groups(policy.vocabulary, policy.max_positions)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("model.lora.use_dora=true", "model.lora.modules_to_save=[lm_head]"),
        ("model.precision=bfloat16", "model.gradient_checkpointing=true"),
    ],
    ids=["plain", "dora and the head", "bfloat16"],
)
def test_every_stage_goes_on_bit_for_bit(tmp_path: Path, more: tuple[str, ...]) -> None:
    same_after_interruptions(tmp_path, *LORA, *more)
