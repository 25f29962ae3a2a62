"""Attention where segments lie sees what tiles see: FlexAttention by its definition, varlen_attn by what it is told."""

from __future__ import annotations

import os
import random
import shutil
from itertools import pairwise

import pytest
import torch
from exactness import sample_groups
from families import VOCABULARY
from flat_layouts import random_options, random_segments, tensors
from stubs import tiny_policy
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen

from rlpost.policy import load, segment_attention
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.check import probe_groups
from rlpost.policy.kernel_check import FLEX, VARLEN, exact_kernels, why_not
from rlpost.policy.layout import FlatLayout
from rlpost.policy.params import Model
from rlpost.policy.segment_attention import BLOCK, TILES, Kernels, SegmentAttention
from rlpost.policy.tiles import Segment
from rlpost.types import Group

LAYOUTS = 40


@pytest.fixture(autouse=True)
def definition(monkeypatch):
    """FlexAttention by its definition, not compiled: scores of all pairs."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def has_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def sees(segments: list[Segment], tokens: int, window: int | None) -> torch.Tensor:
    """[T, T] bool which keys each query sees, by what a segment is."""
    found = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in segments:
        row = [*range(s.prefix_start, s.prefix_start + s.prefix), *range(s.start, s.start + s.length)]
        for at in range(s.prefix, len(row)):
            found[row[at], row[max(0, at + 1 - (window or at + 1)) : at + 1]] = True
    return found


def test_flex_attention_gives_what_tiles_give():
    draw = random.Random(0)
    for number in range(LAYOUTS):
        segments, tokens = random_segments(draw, shared=number % 4 > 0)
        options, groups = random_options(draw), draw.choice([1, 2, 4])
        inputs = tensors(draw, tokens, 4, groups, torch.float64)
        expected = FlatLayout(segments, tokens).attend(*inputs, options)
        layout = FlatLayout(segments, tokens)
        layout.kernels = FLEX
        found = layout.attend(*inputs, options)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 1e-12, (segments, options)


@pytest.mark.slow  # a minute
@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
def test_flex_attention_is_compiled_once_for_all_lengths(monkeypatch):
    """Forward alone: PyTorch compiles no backward pass of it for a CPU."""
    compiled = segment_attention._flex("cuda")
    monkeypatch.setattr(segment_attention, "_flex", lambda _: compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    draw = random.Random(3)
    with torch.no_grad():
        for number in range(LAYOUTS):
            segments, tokens = random_segments(draw, shared=number % 4 > 0)
            options = AttentionOptions(None, random_options(draw).window, draw.choice([None, 0.75]))
            inputs = tensors(draw, tokens, 4, 2, torch.float32, width=32)
            layout = FlatLayout(segments, tokens)
            layout.kernels = FLEX
            expected = FlatLayout(segments, tokens).attend(*inputs, options)
            assert float((layout.attend(*inputs, options) - expected).abs().max()) < 1e-5, (segments, options)
    # With a cap or without; of one token, of one block, of more.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def test_the_mask_lists_the_blocks_that_have_something_to_see_and_no_others():
    draw = random.Random(1)
    for number in range(LAYOUTS):
        segments, tokens = random_segments(draw, shared=number % 4 > 0)
        window = random_options(draw).window
        visible = sees(segments, tokens, window)
        mask = SegmentAttention(segments, tokens, "cpu").mask(window)
        at = torch.arange(tokens)
        assert torch.equal(mask.mask_mod(None, None, at[:, None], at[None]), visible)
        blocks = -(-tokens // BLOCK)
        padded = torch.zeros(blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
        padded[:tokens, :tokens] = visible
        needed = padded.view(blocks, BLOCK, blocks, BLOCK).any(3).any(1)
        assert torch.equal(mask.to_dense()[0, 0].bool(), needed), (segments, window)


def flash(query, key, value, ends, key_ends, longest, longest_key, *, scale, window_size, enable_gqa):
    """What varlen_attn says of itself: a query sees `window_size[0]` keys before its own, all at -1, none behind."""
    assert ends.dtype == torch.int32
    assert torch.equal(ends, key_ends)
    assert window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    bounds = ends.tolist()
    assert max(b - a for a, b in pairwise(bounds)) == longest == longest_key
    pieces = []
    for a, b in pairwise(bounds):
        q, k, v = (x[a:b].transpose(0, 1)[None].double() for x in (query, key, value))
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
        mask = (distance >= 0) & ((distance <= window_size[0]) | torch.tensor(window_size[0] < 0))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        pieces.append(out[0].transpose(0, 1).to(query.dtype))
    return torch.cat(pieces)


def test_varlen_attn_is_told_what_tiles_see(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    draw = random.Random(2)
    for _ in range(LAYOUTS):
        segments, tokens = random_segments(draw, shared=False)
        options = AttentionOptions(draw.choice([None, 0.3]), random_options(draw).window)
        inputs = tensors(draw, tokens, 4, draw.choice([1, 2, 4]), torch.bfloat16)
        expected = FlatLayout(segments, tokens).attend(*(x.double() for x in inputs), options)
        layout = FlatLayout(segments, tokens)
        layout.kernels = VARLEN
        assert float((layout.attend(*inputs, options).double() - expected).abs().max()) < 2e-2, (segments, options)


def test_each_kernel_has_its_own_rows(monkeypatch):
    """FlashAttention those of 16 bits without shared prompts or caps; neither kernel those with sinks."""
    chosen: list[str] = []
    for name in ("varlen", "flex"):
        monkeypatch.setattr(SegmentAttention, name, lambda *_, name=name: chosen.append(name))
    packed, shared = [Segment(0, 9), Segment(9, 4)], [Segment(0, 9), Segment(9, 4, 0, 9)]
    plain, both = AttentionOptions(), Kernels(flex=True, varlen=True)

    def choice(segments, kernels, options, dtype) -> str:
        chosen.clear()
        inputs = [torch.zeros(1, 2, 13, 8, dtype=dtype)] * 3
        SegmentAttention(segments, 13, "cpu").attend(kernels, *inputs, options)
        return chosen[0] if chosen else "tiles"

    half, full = torch.bfloat16, torch.float32
    assert choice(packed, both, plain, half) == "varlen"
    assert choice(packed, both, plain, full) == "flex"
    assert choice(packed, both, AttentionOptions(softcap=1.0), half) == "flex"
    assert choice(shared, both, plain, half) == "flex"
    assert choice(shared, VARLEN, plain, half) == "tiles"
    assert choice(packed, VARLEN, plain, full) == "tiles"
    assert choice(shared, both, AttentionOptions(sinks=torch.zeros(2)), half) == "tiles"
    assert choice(packed, TILES, plain, half) == "tiles"


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_model_says_the_same(family, half, monkeypatch):
    """Windows and caps among them."""
    calls = []
    real = SegmentAttention.flex
    monkeypatch.setattr(SegmentAttention, "flex", lambda *x: calls.append(x[1].dtype) or real(*x))
    policy = tiny_policy(family)
    policy.in_bfloat16 = half
    groups = sample_groups(VOCABULARY)
    with torch.no_grad():
        expected = policy(policy.batch(groups)).logp_N
        assert not calls
        policy.kernels = FLEX
        found = policy(policy.batch(groups)).logp_N
    assert calls == [torch.bfloat16 if half else torch.float32] * policy.causal_lm.config.num_hidden_layers
    difference = (found - expected).abs()
    assert float(difference.mean() if half else difference.max()) < (0.05 if half else 1e-4)


def test_a_model_that_keeps_tiles_on_its_device_says_so_once(llama_folder, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(load.console, "notice", said.append)
    load._tell_once.cache_clear()
    found = [(FLEX, ""), (TILES, "with FlexAttention its states differ by 1.0e-02")]
    monkeypatch.setattr(load, "exact_kernels", lambda *_: found[-1])
    for _ in range(2):
        assert load.load_policy(llama_folder, Model(path=str(llama_folder))).kernels == TILES
    told = f"attention runs on padded tiles, which is slower: {found[-1][1]}"
    assert said.count(told) == 1
    found.pop()
    assert load.load_policy(llama_folder, Model(path=str(llama_folder))).kernels == FLEX
    assert load.load_policy(llama_folder, Model(path=str(llama_folder), fast=False)).kernels == TILES


def test_what_cannot_be_proved_exact_is_not_used(monkeypatch):
    policy = tiny_policy("llama")
    groups = probe_groups(policy.vocabulary, policy.max_positions)
    assert exact_kernels(policy, groups) == (TILES, "")  # not for a CPU, and so nothing to say
    assert why_not(policy, groups, FLEX).startswith("FlexAttention does not run on it (NotImplementedError")
    policy.in_bfloat16 = True
    alone = [Group(g.prompt, g.completions[:1]) for g in groups]
    assert why_not(policy, alone, VARLEN).startswith("varlen_attn does not run on it (NotImplementedError")
    policy.in_bfloat16 = False

    def backward_too(*tensors, **more):
        """Its definition with a gradient, which PyTorch refuses on a CPU."""
        mask = more["block_mask"].mask_mod(
            None, None, *torch.meshgrid(*[torch.arange(tensors[0].shape[2])] * 2, indexing="ij")
        )
        return torch.nn.functional.scaled_dot_product_attention(
            *tensors, attn_mask=mask, scale=more["scale"], enable_gqa=True
        )

    monkeypatch.setattr("rlpost.policy.segment_attention._flex", lambda _: backward_too)
    before = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    assert why_not(policy, groups, FLEX) == ""
    assert policy.kernels == TILES
    assert {n: p.requires_grad for n, p in policy.model.named_parameters()} == before

    monkeypatch.setattr("rlpost.policy.segment_attention._flex", lambda _: lambda *x, **y: 1.01 * backward_too(*x, **y))
    assert why_not(policy, groups, FLEX).startswith("with FlexAttention its states differ by ")

    def wrong_gradient(*tensors, **more):
        key = tensors[1]
        return backward_too(tensors[0], 1.05 * key - 0.05 * key.detach(), tensors[2], **more)

    monkeypatch.setattr("rlpost.policy.segment_attention._flex", lambda _: wrong_gradient)
    assert why_not(policy, groups, FLEX).startswith("with FlexAttention its gradients differ by ")
