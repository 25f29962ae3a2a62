"""Reducing logits tile by tile: values by hand, and recomputed tiles against one go."""

import math

import pytest
import torch
from families import EndTokenOnly, tiny
from torch import nn

from rlpost.policy import logprobs
from rlpost.policy.logprobs import DistributionLoss, LogitStats, score
from rlpost.policy.policy import Policy

V = 11


def identity(x):
    return x


def first_and_own(logp_NV, logp_N):
    return logp_NV[:, 0] - 0.5 * logp_N


EVERYTHING = LogitStats(
    0.7, entropy=True, collision=True, distribution=True, loss=DistributionLoss(first_and_own, {"logp_NV", "logp_N"})
)
STATS = pytest.mark.parametrize("stats", [LogitStats(0.7), EVERYTHING], ids=["logprobs", "everything"])


def test_numbers_by_hand():
    logits = torch.tensor([[1.0, 1.0, 2.0, 4.0]]).log()
    found = score(logits, identity, 4, torch.tensor([2]), LogitStats(entropy=True, collision=True, distribution=True))
    entropy = 2 * 0.125 * math.log(8) + 0.25 * math.log(4) + 0.5 * math.log(2)
    assert found.logp_N.tolist() == pytest.approx([math.log(0.25)])
    assert found.entropy_N.tolist() == pytest.approx([entropy])
    assert found.collision_N.tolist() == pytest.approx([math.log(2 / 64 + 1 / 16 + 1 / 4)])
    assert found.distribution_NV.exp().tolist() == [pytest.approx([0.125, 0.125, 0.25, 0.5])]


def test_what_is_not_asked_for_is_not_there():
    logits = torch.tensor([[1.0, 1.0, 2.0, 4.0]]).log()
    assert score(logits, identity, 4, torch.tensor([2]))[1:] == (None,) * 6
    assert [x is None for x in score(logits, identity, 4, torch.tensor([2]), LogitStats(entropy=True))] == [
        *(False, False),
        *(True,) * 5,
    ]


def test_a_loss_is_told_what_it_asks_for():
    def loss(teacher_NV, target_N, logp_N):
        return teacher_NV[:, 0] + target_N + logp_N

    stats = LogitStats(loss=DistributionLoss(loss, frozenset({"teacher_NV", "target_N", "logp_N"})))
    logits, teacher = torch.tensor([[1.0, 1.0, 2.0, 4.0]] * 3).log(), torch.arange(12.0).view(3, 4)
    found = score(logits, identity, 4, torch.tensor([2, 0, 1]), stats, lambda where: teacher[where])
    assert found.loss_N.tolist() == pytest.approx([2 - math.log(4), 4 - math.log(8), 9 - math.log(8)])


def test_temperature_divides_logits():
    logits = torch.tensor([[1.0, 2.0, 4.0]]).log()  # at temperature ½: 1, 4, 16 of 21
    for entropy in (False, True):
        found = score(logits, identity, 3, torch.tensor([1]), LogitStats(0.5, entropy=entropy))
        assert found.logp_N.item() == pytest.approx(math.log(4 / 21))


def test_uniform_entropy_is_the_logarithm_of_the_vocabulary():
    found = score(torch.zeros(1, V), identity, V, torch.tensor([0]), LogitStats(entropy=True))
    assert (found.logp_N.item(), found.entropy_N.item()) == pytest.approx((-math.log(V), math.log(V)))


@pytest.mark.parametrize("at_once", [1, 4 * V, 5 * 4 * V])
@STATS
def test_recomputed_tiles_give_the_same_values_and_gradients(at_once, stats, monkeypatch):
    torch.manual_seed(0)
    head = nn.Linear(6, V).double()
    hidden = torch.randn(37, 6, dtype=torch.float64, requires_grad=True)
    target, coefficient = torch.randint(0, V, (37,)), torch.randn(37, dtype=torch.float64)

    def columns():
        found = [x for x in score(hidden, head, V, target, stats) if x is not None]
        return torch.cat([x.view(37, -1) for x in found], 1)

    def run():
        out = columns()
        total = (coefficient * out.sum(1)).sum()
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
        assert torch.allclose(columns(), whole, rtol=0, atol=1e-14)
    assert len(calls) == math.ceil(37 / tile)


def test_few_positions_are_computed_in_one_go():
    calls = []
    head = nn.Linear(6, V)
    head.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(30, 6, requires_grad=True)
    score(hidden, head, V, torch.zeros(30, dtype=torch.long)).logp_N.sum().backward()
    assert len(calls) == 1


@STATS
def test_numbers_are_in_at_least_float32(stats):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        found = score(torch.zeros(2, V, dtype=dtype), identity, V, torch.zeros(2, dtype=torch.long), stats)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {x.dtype for x in found if x is not None} == {wide}


def test_no_scored_position():
    found = score(torch.zeros(0, V), identity, V, torch.zeros(0, dtype=torch.long), EVERYTHING)
    assert [tuple(x.shape) for x in found if x is not None] == [(0,), (0,), (0,), (0, V), (0,)]
    assert score(torch.zeros(0, V), identity, V, torch.zeros(0, dtype=torch.long)).logp_N.shape == (0,)


def test_a_policy_with_small_tiles_scores_as_with_one(groups, monkeypatch):
    model = tiny("gpt2", torch.float64)
    model.set_attn_implementation("rlpost_flat")
    policy = Policy(model, EndTokenOnly(), flat=True)
    batch = policy.batch(groups)

    def run():
        model.zero_grad()
        scores = policy(batch, LogitStats(1.3, entropy=True))
        (scores.logp_N.sum() + 0.1 * scores.entropy_N.sum()).backward()
        return scores, torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, whole_gradient = run()
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 64 * 4 * 5)
    tiled, tiled_gradient = run()
    assert torch.allclose(tiled.logp_N, whole.logp_N, rtol=0, atol=1e-12)
    assert torch.allclose(tiled.entropy_N, whole.entropy_N, rtol=0, atol=1e-12)
    assert (tiled_gradient - whole_gradient).norm() <= 1e-12 * whole_gradient.norm()
    plain = policy(batch, LogitStats(1.3))
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
