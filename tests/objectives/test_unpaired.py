"""KTO by hand, its point of reference, and that it may be cut."""

import math

import pytest
import torch

from rlpost.objectives import Ragged
from rlpost.objectives.unpaired import Unpaired, kto


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def unpaired(delta, mismatched, desirable) -> Unpaired:
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (delta, mismatched))
    return Unpaired(*numbers, torch.tensor(desirable, dtype=torch.bool))


def test_the_loss_by_hand():
    both = unpaired([3.0, 3.0], [0.5, 1.5], [True, False])  # z = 1
    value = kto(both, beta=0.5, desirable=2.0, undesirable=3.0)
    assert value.tolist() == pytest.approx([2 * (1 - sigmoid(1.0)), 3 * (1 - sigmoid(-1.0))])


def test_the_point_of_reference():
    assert unpaired([0.0], [0.5, 1.5, -0.5], [True]).reference_point.item() == 0.5
    assert unpaired([0.0], [-3.0, 1.0], [True]).reference_point.item() == 0.0  # a divergence is not negative
    assert unpaired([0.0], [], [True]).reference_point.item() == 0.0


def test_at_the_reference_every_completion_loses_half_its_weight():
    value = kto(unpaired([0.0, 0.0], [0.0, 0.0], [True, False]), desirable=1.0, undesirable=4.0)
    assert value.tolist() == [0.5, 2.0]


def test_the_desirable_rise_the_others_fall_and_z_has_no_gradient():
    delta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    mismatched = torch.ones(2, dtype=torch.float64, requires_grad=True)
    kto(Unpaired(delta, mismatched, torch.tensor([True, False])), beta=0.1).sum().backward()
    slope = 0.1 * sigmoid(-0.1) * sigmoid(0.1)
    assert delta.grad.tolist() == pytest.approx([-slope, slope])
    assert mismatched.grad is None


def test_gradients_are_those_of_finite_differences():
    delta = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False, True])
    mismatched = torch.tensor([0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kto(Unpaired(x, mismatched, good), beta=0.7, undesirable=2.0), delta)


def test_the_gradient_does_not_depend_on_the_cut():
    torch.manual_seed(0)
    logp = torch.randn(9, dtype=torch.float64, requires_grad=True)
    rows, good = Ragged([2, 3, 0, 4]), torch.tensor([True, False, False, True])
    mismatched = torch.randn(4, dtype=torch.float64) + 0.5
    (whole,) = torch.autograd.grad(kto(Unpaired(rows.sum(logp), mismatched, good), beta=1.0).sum(), logp)
    total = torch.zeros_like(whole)
    for s in range(4):  # one completion a part, the update's z in each
        one = Unpaired(rows.sum(logp)[s : s + 1], mismatched, good[s : s + 1])
        total += torch.autograd.grad(kto(one, beta=1.0).sum(), logp)[0]
    assert (total - whole).norm() / whole.norm() < 1e-14
    own = torch.zeros_like(whole)
    for s in range(4):  # the paper's estimate of each part
        one = Unpaired(rows.sum(logp)[s : s + 1], mismatched[s : s + 1], good[s : s + 1])
        own += torch.autograd.grad(kto(one, beta=1.0).sum(), logp)[0]
    assert (own - whole).norm() / whole.norm() > 1e-3


def test_extremes_no_completions_and_half_precision():
    far = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    value = kto(Unpaired(far, torch.zeros(1), torch.tensor([True, False])))
    value.sum().backward()
    assert value.tolist() == [1.0, 1.0]
    assert far.grad.isfinite().all()
    assert kto(unpaired([], [], [])).shape == (0,)
    narrow = torch.zeros(2, dtype=torch.bfloat16)
    assert kto(Unpaired(narrow, narrow, torch.tensor([True, False]))).dtype == torch.float32
