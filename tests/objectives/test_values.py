"""The critic's loss by hand."""

import pytest
import torch

from rlpost.objectives.values import value_loss


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
