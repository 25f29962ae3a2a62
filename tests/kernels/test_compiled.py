"""The compiled functions beside the same arithmetic in float64."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlpost.engine.params import Sampling
from rlpost.engine.sampling import choose, greedy
from rlpost.kernels import attention, build, ops, step
from rlpost.kernels.build import why_none

pytestmark = pytest.mark.skipif(bool(why_none()), reason=f"no compiled functions here: {why_none()}")

DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Largest difference, as a share of the largest number."""


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_near(found, wanted, dtype, times=1):
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape
    if not wanted.numel():
        return
    assert float((found - wanted).abs().max()) <= times * NEAR[dtype] * max(1e-3, float(wanted.abs().max()))


def rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "scale"), [(1, 16, 1.0), (7, 48, 1e-3), (100, 256, 1.0)])
def test_norms(dtype, tokens, width, scale):
    x, added = draw(tokens, width, seed=1, scale=scale), draw(tokens, width, dtype=dtype, seed=2, scale=scale)
    weight, grad, passing = draw(width, seed=3), draw(tokens, width, dtype=dtype, seed=4), draw(tokens, width, seed=5)
    whole = (x.double() + added.double()).requires_grad_()
    wide = weight.double().requires_grad_()
    wanted = rms_norm(whole, wide, 1e-5)
    wanted.backward(grad.double())

    middle, normed, inverse = ops.norm(x, added, weight, 1e-5, dtype)
    assert_near(middle, whole, torch.float32)
    assert_near(normed, wanted, dtype)
    of_x, of_weight = ops.norm_backward(grad, middle, inverse, weight, passing)
    assert_near(of_x, whole.grad + passing, torch.float32)
    assert_near(of_weight, wide.grad, torch.float32)
    assert_near(ops.norm_backward(grad, middle, inverse, weight, None)[0], whole.grad, torch.float32)

    alone, plain, _ = ops.norm(x, None, None, 1e-5, dtype)
    assert alone is x
    assert_near(plain, rms_norm(x.double(), 1, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_swiglu(dtype, scale):
    gate_up, grad = draw(33, 96, dtype=dtype, scale=scale), draw(33, 48, dtype=dtype, seed=1)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    wanted = F.silu(gate) * up
    wanted.backward(grad.double())
    assert_near(ops.swiglu(gate_up), wanted, dtype)
    of_gate_up, again = ops.swiglu_backward(gate_up, grad)
    assert torch.equal(again, ops.swiglu(gate_up))
    assert_near(of_gate_up, wide.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype):
    x, added = draw(5, 48), draw(5, 48, dtype=dtype, seed=1)
    before = x.clone()
    assert torch.equal(ops.add(x, added), x + added.float())
    assert torch.equal(x, before)


def test_bfloat16_is_rounded_as_torch_does_and_keeps_what_is_no_number():
    x = torch.cat([draw(4000), torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.00390625, 1.01171875])])
    x = torch.cat([x, torch.zeros(-len(x) % 16)])[None]
    # A norm with an inverse of one: what is stored is x itself.
    weight = torch.full((x.shape[1],), 1.0)
    gate_up = torch.cat([torch.full_like(x, 100.0), x / 100.0], 1)
    found = ops.swiglu(gate_up.bfloat16())
    wanted = (gate_up.bfloat16().float()[:, : x.shape[1]] * gate_up.bfloat16().float()[:, x.shape[1] :]).bfloat16()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert len(weight) == x.shape[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities(dtype, vocabulary, temperature):
    whole = draw(9, vocabulary + 5, dtype=dtype, scale=4.0)
    whole[:, 0] = -1e30 if vocabulary > 1 else 0.0
    target = torch.randint(min(1, vocabulary - 1), vocabulary, (9,), generator=torch.Generator().manual_seed(1))
    logits = whole.requires_grad_()[:, :vocabulary]
    wide = whole.detach().double().requires_grad_()
    wanted = (wide[:, :vocabulary] / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]
    grad = draw(9, seed=2)
    found = ops.log_probability(logits, target, 1 / temperature)
    assert_near(found, wanted, torch.float32)
    found.backward(grad)
    wanted.backward(grad.double())
    assert_near(whole.grad, wide.grad, dtype)


def test_the_gradient_takes_the_place_of_the_logits():
    """They are the largest tensor of an update. Who needs them afterwards is told so."""
    logits, target = draw(9, 32).requires_grad_(), torch.zeros(9, dtype=torch.long)
    made = logits * 1.0
    found = ops.log_probability(made, target)
    found.sum().backward(retain_graph=True)
    assert torch.equal(made, logits.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
    made = logits.tanh()  # its own gradient needs its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ops.log_probability(made, target).sum().backward()


def test_a_row_with_what_is_no_number_has_no_log_probability():
    logits = draw(3, 40)
    logits[1, 37] = float("nan")
    assert ops.log_probability(logits, torch.zeros(3, dtype=torch.long)).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("target", [-1, 40, -100])
def test_a_target_that_is_no_column_is_refused(target):
    with pytest.raises(IndexError, match=f"{target}"):
        ops.log_probability(draw(2, 40), torch.tensor([0, target]))


def test_angles_of_another_width_are_refused():
    parts = draw(5, 3 * 32).split_with_sizes([32, 32, 32], 1)
    inputs = attention.Inputs(attention.Families([(0, 5, 0, 0)]), *parts, draw(5, 16), draw(5, 16), 32, 1.0)
    with pytest.raises(AssertionError):
        attention.attend(inputs)


# (start, length, start of its prompt, length of its prompt)
SEGMENTS = {
    "rows": [(0, 1, 0, 0), (1, 33, 0, 0), (34, 70, 0, 0), (104, 0, 0, 0), (104, 32, 0, 0)],
    "shared": [(0, 20, 0, 0), (20, 40, 0, 20), (60, 1, 0, 20), (61, 33, 61, 0), (94, 7, 61, 33), (101, 64, 61, 33)],
    "nested": [(0, 5, 0, 0), (5, 6, 0, 5), (11, 9, 5, 6), (20, 3, 11, 9)],
    "part of a row": [(0, 40, 0, 0), (40, 10, 3, 17), (50, 12, 0, 40)],
    "none": [],
}


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def dense_attention(segments, query, key, value, cos, sin, scale):
    """[T, H, d] with every score written out."""
    query, key = turned(query, cos, sin) * scale, turned(key, cos, sin)
    repeats = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeats, 1))
    sees = torch.zeros(scores.shape[1:], dtype=torch.bool)
    for start, length, prompt_start, prompt in segments:
        rows = slice(start, start + length)
        sees[rows, prompt_start : prompt_start + prompt] = True
        sees[rows, rows] |= torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(repeats, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(2, 2, 16), (6, 2, 24), (4, 1, 64), (3, 3, 6)])
def test_attention(dtype, name, heads, key_heads, width):
    segments = SEGMENTS[name]
    tokens = max((start + length for start, length, *_ in segments), default=0)
    qkv = draw(tokens + 3, (heads + 2 * key_heads) * width, dtype=dtype, scale=1.5)
    cos, sin = draw(tokens, width, seed=1), draw(tokens, width, seed=2)
    parts = qkv.split_with_sizes([n * width for n in (heads, key_heads, key_heads)], 1)
    inputs = attention.Inputs(attention.Families(segments), *parts, cos, sin, width, 0.3)
    result, total = attention.attend(inputs)
    grad = draw(tokens + 3, heads * width, dtype=dtype, seed=3)
    gradient = attention.attend_backward(inputs, grad, result, total)

    wide = [p[:tokens].double().reshape(tokens, p.shape[1] // width, width).requires_grad_() for p in parts]
    wanted = dense_attention(segments, *wide, cos.double(), sin.double(), 0.3)
    assert_near(result[:tokens], wanted.flatten(1), dtype)
    assert not result[tokens:].any()
    assert not gradient[tokens:].any()
    wanted.flatten(1).backward(grad[:tokens].double())
    of_parts = gradient[:tokens].split_with_sizes([n * width for n in (heads, key_heads, key_heads)], 1)
    for found, x in zip(of_parts, wide, strict=True):
        # The result, which the gradient of a softmax needs, has been rounded.
        assert_near(found, x.grad.flatten(1), dtype, times=4)


def test_attention_has_the_same_bits_with_any_number_of_threads():
    segments, width = SEGMENTS["shared"], 32
    parts = draw(165, 8 * width).split_with_sizes([4 * width, 2 * width, 2 * width], 1)
    cos, sin, grad = draw(165, width, seed=1), draw(165, width, seed=2), draw(165, 4 * width, seed=3)
    inputs = attention.Inputs(attention.Families(segments), *parts, cos, sin, width, 0.2)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result, total = attention.attend(inputs)
            of_weight = ops.norm_backward(grad, draw(165, 128), draw(165, 1), draw(128), None)[1]
            found.append((result, attention.attend_backward(inputs, grad, result, total), of_weight))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_families_are_segments_that_share_tokens():
    families = attention.Families(SEGMENTS["shared"])
    assert sorted(families.families.tolist()) == [[0, 61, 0, 3], [61, 165, 3, 6]]
    assert families.most_tokens == 104
    assert families.most_keys == 48 + 64
    assert attention.Families([]).families.shape == (0, 4)


def affine(out, width, dtype, seed, bias=False):
    """A packed layer, and what it computes in float64."""
    weight, offset = draw(out, width, seed=seed, scale=width**-0.5).to(dtype), draw(out, seed=seed) if bias else None

    def wide(x):
        return x @ weight.double().T + (0 if offset is None else offset.double())

    return step.Packed(weight, offset, dtype), wide


class Reference:
    """A model of two layers, its caches, and the same in float64 with everything written out."""

    def __init__(self, dtype, heads, key_heads, width, window, head_norms):
        self.dtype, self.window, self.heads = dtype, window, (heads, key_heads, width)
        self.columns, self.length, room, hidden, inner = 21, 19, 32, 48, 80
        self.prompt_of_row = np.array([0] * 11 + [1] + [2] * 3)
        self.begin = np.array([0, 20, 7], np.int32)
        rows = len(self.prompt_of_row)
        both = (heads + 2 * key_heads) * width
        blocks, self.wide, self.caches, self.own = [], [], [], []
        for layer in range(2):
            parts = [
                affine(both, hidden, dtype, layer + 1, bias=True),
                affine(hidden, heads * width, dtype, layer + 3),
                affine(2 * inner, hidden, dtype, layer + 5),
                affine(hidden, inner, dtype, layer + 7, bias=layer == 1),
            ]
            norms = ((draw(width, seed=layer), 1e-4), (draw(width, seed=layer + 1), 1e-3)) if head_norms else None
            blocks.append(step.Block(*(p for p, _ in parts), (1e-5, 1e-2), norms, 0.3, window))
            self.wide.append(([w for _, w in parts], norms))
            prompt_key, prompt_value = (draw(3, key_heads, self.columns, width, seed=layer + n) for n in (1, 2))
            own = [draw(rows + 2, key_heads, room, width, dtype=dtype, seed=layer + n) for n in (3, 4)]
            self.own.append([x.clone() for x in own])
            slack = step.with_slack(torch.empty(0), 3, key_heads, width, self.columns).copy_(prompt_key.mT)
            lanes = own[0].view(rows + 2, key_heads, -1, ops.LINE, width).transpose(3, 4).contiguous()
            self.caches.append(step.Cached(slack.mT, prompt_value, lanes, own[1]))
        head, self.wide_head = affine(37, hidden, dtype, 9)
        self.step = step.Step(blocks, head, 1e-5, self.heads)
        self.x, self.cos, self.sin = draw(rows, hidden), draw(rows, width, seed=1), draw(rows, width, seed=2)

    def run(self):
        rows = step.Rows(step.chunks_of(self.prompt_of_row), self.begin, self.length)
        return self.step(self.x.clone(), self.cos, self.sin, rows, self.caches)

    def attended(self, layer, query, key, value):
        """[B, H·d], after writing the new keys and values to `self.own`."""
        own_key, own_value = self.own[layer]
        own_key[: len(key), :, self.length - 1], own_value[: len(key), :, self.length - 1] = key, value
        found = []
        for row, prompt in enumerate(self.prompt_of_row):
            cached = self.caches[layer]
            keys, values = (
                torch.cat([p[prompt, :, self.begin[prompt] :], own[row, :, : self.length]], 1).double()
                for p, own in ((cached.prompt_key, own_key), (cached.prompt_value, own_value))
            )
            seen = slice(max(0, keys.shape[1] - (self.window or 10**6)), None)
            keys, values = (x[:, seen].repeat_interleave(self.heads[0] // self.heads[1], 0) for x in (keys, values))
            weights = torch.einsum("hd,hkd->hk", query[row], keys).softmax(-1)
            found.append(torch.einsum("hk,hkd->hd", weights, values).flatten())
        return torch.stack(found)

    def wanted(self):
        heads, key_heads, width = self.heads
        x, angles = self.x.double(), (self.cos.double(), self.sin.double())
        for layer, ((into, back, gate_up, down), norms) in enumerate(self.wide):
            qkv = into(rms_norm(x, 1, 1e-5)).view(len(x), -1, width)
            query, key, value = qkv.split_with_sizes([heads, key_heads, key_heads], 1)
            if norms is not None:
                query, key = (rms_norm(y, w.double(), eps) for y, (w, eps) in zip((query, key), norms, strict=True))
            query, key = turned(query, *angles) * 0.3, turned(key, *angles)
            x = x + back(self.attended(layer, query, key, value))
            gate, up = gate_up(rms_norm(x, 1, 1e-2)).chunk(2, -1)
            x = x + down(F.silu(gate) * up)
        return self.wide_head(rms_norm(x, 1, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(2, 2, 16), (6, 2, 32), (8, 1, 48)])
@pytest.mark.parametrize("window", [None, 26, 9])
@pytest.mark.parametrize("head_norms", [False, True])
def test_a_decoding_step(dtype, heads, key_heads, width, window, head_norms):
    reference = Reference(dtype, heads, key_heads, width, window, head_norms)
    found, wanted = reference.run(), reference.wanted()
    assert found.dtype == dtype
    assert_near(found, wanted, dtype, times=4)
    for cached, own in zip(reference.caches, reference.own, strict=True):
        # The caches hold the new token, and what they held before.
        assert_near(cached.own_key.transpose(3, 4).flatten(2, 3), own[0], dtype, times=4)
        assert_near(cached.own_value, own[1], dtype, times=4)


@pytest.mark.slow
def test_a_decoding_step_on_a_processor_without_bfloat16(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-U__AVX512BF16__"))
    build.library.cache_clear()
    try:
        reference = Reference(torch.bfloat16, 6, 2, 32, None, False)
        assert_near(reference.run(), reference.wanted(), torch.bfloat16, times=4)
    finally:
        build.library.cache_clear()


def test_a_decoding_step_has_the_same_bits_with_any_number_of_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Reference(torch.float32, 6, 2, 32, None, True).run())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_chunks_are_rows_of_one_prompt():
    assert step.chunks_of(np.array([0] * 9 + [2])).tolist() == [[0, 0, 8], [0, 8, 9], [2, 9, 10]]
    assert step.chunks_of(np.zeros(0, np.int64)).shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 15, 64, 65, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_choices_are_those_of_the_plain_path(dtype, vocabulary, temperature):
    whole = draw(500, vocabulary + 3, dtype=dtype, scale=3.0)
    logits = whole[:, :vocabulary]
    uniform = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(vocabulary))
    sampling = Sampling(temperature=temperature)
    token, logp = choose(logits, uniform, sampling)
    found, found_logp = choose(logits, uniform, sampling, compiled=True)
    assert torch.equal(token, found)
    assert_near(found_logp, logp, torch.float32)


def test_a_number_on_a_boundary_takes_the_token_behind_it():
    uniform = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    assert ops.sample(torch.zeros(3, 128), uniform, 1.0)[0].tolist() == [64, 32, 96]
    assert choose(torch.zeros(3, 128), uniform, Sampling())[0].tolist() == [64, 32, 96]


@pytest.mark.parametrize("uniform", [1e-300, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize("possible", [0, 63, 64, 69])
def test_a_token_without_mass_is_never_chosen(uniform, possible):
    logits = torch.full((1, 70), -1e30)
    logits[0, possible] = 3.0
    token, logp = ops.sample(logits, torch.tensor([uniform], dtype=torch.float64), 1.0)
    assert token.tolist() == [possible]
    assert logp.tolist() == [0.0]


def test_filters_and_greedy_tokens_are_left_to_the_plain_path():
    logits, uniform = draw(50, 100, scale=3.0), torch.rand(50, dtype=torch.float64)
    for sampling in (greedy(Sampling()), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.2)):
        plain, compiled = (choose(logits, uniform, sampling, compiled=c) for c in (False, True))
        assert all(torch.equal(a, b) for a, b in itertools.chain(zip(plain, compiled, strict=True)))
