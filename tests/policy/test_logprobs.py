"""Reducing logits tile by tile: values by hand, and recomputed tiles against one go."""

import math

import pytest
import torch
from families import EndTokenOnly, tiny
from torch import nn

from rlpost.policy import logprobs
from rlpost.policy.logprobs import over_logits, target_logprob, with_more
from rlpost.policy.policy import Policy

V = 11


def with_entropy(target, temperature=1.0):
    return with_more(target, temperature, True, None)


def identity(x):
    return x


def test_log_probability_and_entropy_by_hand():
    logits = torch.tensor([[1.0, 1.0, 2.0, 4.0]]).log()
    target = torch.tensor([2])
    assert target_logprob(target)(logits, slice(0, 1)).item() == pytest.approx(math.log(0.25))
    both = with_entropy(target)(logits, slice(0, 1))[0].tolist()
    entropy = 2 * 0.125 * math.log(8) + 0.25 * math.log(4) + 0.5 * math.log(2)
    assert both == pytest.approx([math.log(0.25), entropy])


def test_temperature_divides_logits():
    logits = torch.tensor([[1.0, 2.0, 4.0]]).log()  # at temperature ½: 1, 4, 16 of 21
    for reducer in (target_logprob, with_entropy):
        found = reducer(torch.tensor([1]), 0.5)(logits, slice(0, 1)).flatten()[0].item()
        assert found == pytest.approx(math.log(4 / 21))


def test_uniform_entropy_is_the_logarithm_of_the_vocabulary():
    both = with_entropy(torch.tensor([0]))(torch.zeros(1, V), slice(0, 1))
    assert both[0].tolist() == pytest.approx([-math.log(V), math.log(V)])


@pytest.mark.parametrize("at_once", [1, 4 * V, 5 * 4 * V])
@pytest.mark.parametrize("reducer", [target_logprob, with_entropy])
def test_recomputed_tiles_give_the_same_values_and_gradients(at_once, reducer, monkeypatch):
    torch.manual_seed(0)
    head = nn.Linear(6, V).double()
    hidden = torch.randn(37, 6, dtype=torch.float64, requires_grad=True)
    target, coefficient = torch.randint(0, V, (37,)), torch.randn(37, dtype=torch.float64)

    def run():
        out = over_logits(hidden, head, V, reducer(target, 0.7))
        total = (coefficient * out.view(37, -1).sum(1)).sum()
        return out, torch.autograd.grad(total, [hidden, *head.parameters()])

    whole, whole_gradients = run()
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", at_once)
    tiled, tiled_gradients = run()
    tile = max(1, at_once // 4 // V)
    assert len(calls) == 2 * math.ceil(37 / tile)  # each tile once forward and once again for its backward
    assert torch.allclose(tiled, whole, rtol=0, atol=1e-14)
    for a, b in zip(tiled_gradients, whole_gradients, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
    calls.clear()
    with torch.no_grad():
        assert torch.allclose(over_logits(hidden, head, V, reducer(target, 0.7)), whole, rtol=0, atol=1e-14)
    assert len(calls) == math.ceil(37 / tile)


def test_few_positions_are_computed_in_one_go():
    calls = []
    head = nn.Linear(6, V)
    head.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(30, 6, requires_grad=True)
    over_logits(hidden, head, V, target_logprob(torch.zeros(30, dtype=torch.long))).sum().backward()
    assert len(calls) == 1


def test_logits_are_reduced_in_at_least_float32():
    seen = []

    def reduce(logits, where):
        seen.append(logits.dtype)
        return logits.sum(1)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        over_logits(torch.zeros(2, V, dtype=dtype), identity, V, reduce)
    assert seen == [torch.float32] * 3 + [torch.float64]


def test_no_scored_position():
    for reducer, shape in ((target_logprob, (0,)), (with_entropy, (0, 2))):
        out = over_logits(torch.zeros(0, V), identity, V, reducer(torch.zeros(0, dtype=torch.long)))
        assert out.shape == shape


def test_a_policy_with_small_tiles_scores_as_with_one(groups, monkeypatch):
    model = tiny("gpt2", torch.float64)
    model.set_attn_implementation("rlpost_flat")
    policy = Policy(model, EndTokenOnly(), flat=True)
    batch = policy.batch(groups)

    def run():
        model.zero_grad()
        scores = policy(batch, temperature=1.3, entropy=True)
        (scores.logp_N.sum() + 0.1 * scores.entropy_N.sum()).backward()
        return scores, torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, whole_gradient = run()
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 64 * 4 * 5)
    tiled, tiled_gradient = run()
    assert torch.allclose(tiled.logp_N, whole.logp_N, rtol=0, atol=1e-12)
    assert torch.allclose(tiled.entropy_N, whole.entropy_N, rtol=0, atol=1e-12)
    assert (tiled_gradient - whole_gradient).norm() <= 1e-12 * whole_gradient.norm()
    plain = policy(batch, temperature=1.3)
    assert plain.entropy_N is None
    assert torch.allclose(plain.logp_N, whole.logp_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_bfloat16_scores_are_float32_and_near(family, groups):
    model = tiny(family, scale=1.0)
    model.set_attn_implementation("rlpost_flat")
    exact, half = (Policy(model, EndTokenOnly(), flat=True, bfloat16=b) for b in (False, True))
    with torch.no_grad():
        expected, found = exact(exact.batch(groups)).logp_N, half(half.batch(groups)).logp_N
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.05
