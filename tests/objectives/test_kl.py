"""KL estimators and the KL inside the reward."""

import math
from itertools import product

import pytest
import torch

from rlpost.objectives.kl import LIMIT, adaptive, full_kl, k1, k2, k3, k3_weighted, kl_from_old, kl_in_reward
from rlpost.objectives.ragged import Ragged


def test_estimators_by_hand():
    logp, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert k1(logp, reference).item() == pytest.approx(math.log(2))
    assert k2(logp, reference).item() == pytest.approx(0.5 * math.log(2) ** 2)
    assert k3(logp, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k1_and_k3_are_unbiased_on_a_whole_distribution():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    kl = (p * (p / q).log()).sum()
    for estimator in (k1, k3):
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(kl.item(), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative_even_where_rounding_is_all(dtype):
    torch.manual_seed(0)
    ratio = torch.randn(100_000, dtype=dtype) * 10 ** (-7 * torch.rand(100_000, dtype=dtype))
    assert (k3(torch.zeros_like(ratio), ratio) >= 0).all()


def test_k3_stays_finite_for_a_hopeless_reference():
    logp = torch.tensor([-500.0, 0.0], requires_grad=True)
    value = k3(logp, torch.tensor([0.0, -500.0]))
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad.isfinite().all()


def test_kl_from_old_pulls_every_action_back():
    moved = torch.tensor([math.log(2), -math.log(2), 0.0, 1e-3], dtype=torch.float64, requires_grad=True)
    value = kl_from_old(moved, torch.zeros(4, dtype=torch.float64))
    assert value.tolist() == pytest.approx([1 - math.log(2), math.log(2) - 0.5, 0.0, 5e-7], rel=1e-3)
    value.sum().backward()
    assert moved.grad.tolist() == pytest.approx([1.0, -0.5, 0.0, 1e-3], rel=1e-3)


def test_kl_from_old_by_its_size():
    moved = torch.tensor([0.5, -2.0, 1e-3], requires_grad=True)
    value = kl_from_old(moved, torch.zeros(3), estimator="abs")
    assert value.tolist() == pytest.approx([0.5, 2.0, 1e-3])
    value.sum().backward()
    assert moved.grad.tolist() == [1.0, -1.0, 1.0]
    rounded = torch.tensor([1e-5, -1e-5, 0.0], requires_grad=True)
    kl_from_old(rounded, torch.zeros(3), estimator="abs").sum().backward()
    assert rounded.grad.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="estimator='k2'"):
        kl_from_old(moved, moved, estimator="k2")


def test_k3_weighted_is_the_kl_and_its_gradient_whoever_sampled():
    """One state, three actions, drawn by a third policy: the expectation against the sum over the vocabulary."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    sampled = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    found, true = (sampled.exp() * k3_weighted(logp, reference, sampled)).sum(), full_kl(logp[None], reference[None])[0]
    slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, true)]
    assert found.item() == pytest.approx(true.item(), abs=1e-15)
    assert torch.allclose(*slopes, rtol=0, atol=1e-15)


def test_k3_weighted_stays_finite_for_a_hopeless_sample():
    logp = torch.tensor([0.0, -500.0], requires_grad=True)
    value = k3_weighted(logp, torch.tensor([-500.0, 0.0]), torch.tensor([-500.0, 0.0]))
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad.isfinite().all()


def test_k1_as_a_loss_has_expected_gradient_zero():
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    logp = logits.log_softmax(0)
    (logp.exp().detach() * k1(logp, reference)).sum().backward()
    assert logits.grad.abs().max() < 1e-15


def slow_kl_in_reward(kl, lengths, group_size):
    """For every action: what follows of its own completion's KL, less the mean of the others' sums."""
    ends = [sum(lengths[: s + 1]) for s in range(len(lengths))]
    own = [kl[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    found = []
    for s, row in enumerate(own):
        first = s - s % group_size
        others = [sum(own[o]) for o in range(first, first + group_size) if o != s and own[o]]
        baseline = sum(others) / len(others) if others else 0.0
        found += [sum(row[t:]) - baseline for t in range(len(row))]
    return found


@pytest.mark.parametrize(
    ("lengths", "group_size"), [([3, 1, 2, 4, 5, 1], 3), ([2, 0, 3, 1], 2), ([0, 0, 1, 0], 4), ([4, 2], 1)]
)
def test_kl_in_reward_agrees_with_a_slow_loop(lengths, group_size):
    torch.manual_seed(1)
    logp = torch.randn(sum(lengths), dtype=torch.float64, requires_grad=True)
    reference = torch.randn(sum(lengths), dtype=torch.float64)
    found = kl_in_reward(logp, reference, Ragged(lengths), group_size)
    expected = slow_kl_in_reward((logp - reference).tolist(), lengths, group_size)
    assert found.tolist() == pytest.approx(expected, abs=1e-14)
    assert not found.requires_grad


def test_kl_in_reward_is_centred_at_the_first_action_and_zero_at_the_reference():
    lengths, kl = [3, 1, 2, 4], torch.arange(10, dtype=torch.float64)
    rows = Ragged(lengths)
    found = kl_in_reward(kl, torch.zeros(10, dtype=torch.float64), rows, 4)
    assert found[rows.start_S].sum().item() == pytest.approx(0.0, abs=1e-12)
    assert kl_in_reward(kl, kl, rows, 4).abs().max() == 0


def test_its_expected_gradient_is_that_of_the_kl():
    """All groups of two completions of two tokens over two letters, enumerated: E[Σ logp·term] against ∇KL."""
    torch.manual_seed(3)
    policy = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)  # states: start, after 0, after 1
    reference = torch.randn(3, 2, dtype=torch.float64).log_softmax(-1)
    logp = policy.log_softmax(-1)
    sequences = list(product((0, 1), repeat=2))

    def along(table, sequence):
        return torch.stack([table[0, sequence[0]], table[1 + sequence[0], sequence[1]]])

    total = {s: along(logp, s).sum() for s in sequences}
    kl = sum(total[s].exp() * (total[s] - along(reference, s).sum()) for s in sequences)
    expected = torch.autograd.grad(kl, policy, retain_graph=True)[0]
    surrogate = torch.zeros((), dtype=torch.float64)
    for a, b in product(sequences, sequences):
        both = torch.cat([along(logp, a), along(logp, b)])
        ref = torch.cat([along(reference, a), along(reference, b)])
        term = kl_in_reward(both, ref, Ragged([2, 2]), 2)
        surrogate = surrogate + (total[a] + total[b]).exp().detach() * (both * term).sum() / 2
    found = torch.autograd.grad(surrogate, policy)[0]
    assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_kl_in_reward_refuses_rows_that_are_not_whole_groups():
    with pytest.raises(ValueError, match="groups of 2"):
        kl_in_reward(torch.zeros(3), torch.zeros(3), Ragged([1, 1, 1]), 2)


def test_k3_is_clamped_before_it_is_exponentiated():
    logp = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = k3(logp, torch.tensor([LIMIT - 1, LIMIT + 1, -LIMIT - 1], dtype=torch.float64))
    expected = [math.expm1(19) - 19, math.expm1(20) - 20, math.expm1(-20) + 20]
    assert value.tolist() == pytest.approx(expected)
    value.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-math.expm1(19), 0.0, 0.0])


@pytest.mark.parametrize("estimator", [k2, k3])
def test_another_estimator_in_the_reward(estimator):
    logp, reference = torch.tensor([0.5, -1.0, 2.0]), torch.zeros(3)
    each = estimator(logp, reference).tolist()
    found = kl_in_reward(logp, reference, Ragged([2, 1]), 2, estimator)
    expected = [each[0] + each[1] - each[2], each[1] - each[2], each[2] - each[0] - each[1]]
    assert found.tolist() == pytest.approx(expected)


def test_full_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    assert full_kl(p.log(), q.log()).tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0])


def test_full_kl_is_the_expectation_of_k1_and_its_gradient_that_of_k2():
    torch.manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(4, 5, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    value = full_kl(logp, reference)
    assert torch.allclose(value, (logp.exp() * k1(logp, reference)).sum(-1), rtol=0, atol=1e-14)
    sampled = (logp.exp().detach() * k2(logp, reference)).sum()  # the mean over every token that may be drawn
    found, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (value.sum(), sampled))
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_full_kl_of_what_cannot_be_said():
    barred = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()
    everywhere = torch.tensor([[0.25, 0.25, 0.5]]).log()
    for reference in (everywhere, torch.tensor([[0.25, 0.75, 0.0]]).log()):
        value = full_kl(barred, reference)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), barred)[0].isfinite().all()
    assert full_kl(everywhere, barred.detach()).tolist() == [math.inf]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * 1.01),  # 10 % above: a tenth of 10 %
        (5.4, 0.1 * 0.99),
        (60.0, 0.1 * 1.02),  # at most 20 %
        (0.0, 0.1 * 0.98),
        (-1.0, 0.1 * 0.98),  # k1's mean may be negative
    ],
)
def test_the_adaptive_coefficient_by_hand(kl, expected):
    assert adaptive(0.1, kl, target=6.0, horizon=1000, count=100) == pytest.approx(expected)
