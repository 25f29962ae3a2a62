"""The critic's loss by hand."""

import math

import pytest
import torch

from rlpost.objectives.ragged import Ragged
from rlpost.objectives.values import bellman_residual, contrastive_value, monte_carlo_value, value_loss


def loss_and_gradient(value: float, old: float, returns: float = 1.0, **settings) -> tuple[float, float]:
    value_N = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    loss_N = value_loss(value_N, torch.tensor([returns]).double(), torch.tensor([old]).double(), **settings)
    loss_N.sum().backward()
    return loss_N.item(), value_N.grad.item()


@pytest.mark.parametrize(
    ("value", "old", "loss", "slope"),
    [
        (0.1, 0.0, 0.405, -0.9),  # within the clip: ½·0.9²
        (0.6, 0.0, 0.32, 0.0),  # moved towards the return and past the clip: ½·0.8² at 0.2, nothing more to win
        (-0.6, 0.0, 1.28, -1.6),  # moved the wrong way: the larger, ½·1.6², with its gradient
        (1.9, 2.0, 0.405, 0.9),
        (1.1, 2.0, 0.32, 0.0),
        (3.0, 2.0, 2.0, 2.0),
        (3.0, 0.0, 2.0, 2.0),  # past the return by more than the clip holds back
    ],
)
def test_the_loss_and_its_gradient_by_hand(value, old, loss, slope):
    assert loss_and_gradient(value, old) == pytest.approx((loss, slope))


def test_without_a_clip_it_is_half_the_square():
    assert loss_and_gradient(0.6, 0.0, clip=None) == pytest.approx((0.08, -0.4))
    assert loss_and_gradient(-0.6, 0.0, clip=None) == pytest.approx((1.28, -1.6))


def test_a_wide_clip_is_none():
    torch.manual_seed(0)
    value, returns, old = torch.randn(3, 100, dtype=torch.float64)
    wide, none = value_loss(value, returns, old, clip=100.0), value_loss(value, returns, old, clip=None)
    assert torch.allclose(wide, none, rtol=0, atol=1e-13)
    assert (value_loss(value, returns, old) >= none).all()


def test_at_the_old_value_the_clip_takes_nothing_away():
    torch.manual_seed(0)
    value, returns = torch.randn(2, 20, dtype=torch.float64)
    value.requires_grad_()
    value_loss(value, returns, value.detach()).sum().backward()
    assert torch.allclose(value.grad, value.detach() - returns, rtol=0, atol=1e-15)


# V = σ(logit) of two completions' states: 0.2 and 0.6 before two actions, 0.9 before one.
LOGITS = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64).logit()
ROWS = Ragged([2, 0, 1])


def test_the_label_is_what_a_logit_is_to_be_the_probability_of():
    logit_N = LOGITS.clone().requires_grad_()
    loss_N = monte_carlo_value(logit_N, torch.tensor([1.0, 0.0, 0.3]))
    expected = [-math.log(0.2), -math.log(0.4), -0.3 * math.log(0.9) - 0.7 * math.log(0.1)]
    assert loss_N.tolist() == pytest.approx(expected)
    loss_N.sum().backward()
    assert logit_N.grad.tolist() == pytest.approx([-0.8, 0.6, 0.6])


def test_a_bellman_residual_follows_the_next_value_and_does_not_pull_it():
    logit_N = LOGITS.clone().requires_grad_()
    loss_N = bellman_residual(logit_N, torch.tensor([0.0, 0.0, 1.0]), ROWS)
    # 0.2 against 0.6, then the end: 0.6 against its label 0, and 0.9 against its label 1.
    assert loss_N.tolist() == pytest.approx([0.08, 0.18, 0.005])
    loss_N.sum().backward()
    # (V − target)·V(1 − V): the state that is followed has no gradient of the one before it.
    assert logit_N.grad.tolist() == pytest.approx([-0.4 * 0.16, 0.6 * 0.24, -0.1 * 0.09])


def test_a_contrast_with_several_negatives_takes_their_number_off():
    found = contrastive_value(LOGITS, torch.tensor([1.0, 0.0, 0.0]), negatives=3)
    odds = [0.2 / 0.8 / 3, 0.6 / 0.4 / 3, 0.9 / 0.1 / 3]
    assert found.tolist() == pytest.approx([math.log(1 + 1 / odds[0]), math.log(1 + odds[1]), math.log(1 + odds[2])])
