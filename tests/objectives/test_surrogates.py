"""Policy losses: values and gradients by hand, and the identities among them."""

import math

import pytest
import torch

from rlpost.objectives import Rows, clipped_surrogate, clipped_weight, policy_gradient, sequence_clipped
from rlpost.objectives.surrogates import clipped_share, ratio

ALL = [policy_gradient, clipped_surrogate, clipped_weight, sequence_clipped]


def log(*ratios: float) -> torch.Tensor:
    """Log-probabilities whose ratio to an old log-probability of 0 is as given."""
    return torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()


def gradient(surrogate, logp, advantage, rows, **settings):
    loss = surrogate(logp, torch.zeros_like(logp).detach(), torch.tensor(advantage, dtype=logp.dtype), rows, **settings)
    return torch.autograd.grad(loss.sum(), logp)[0].tolist()


def values(surrogate, logp, advantage, rows, **settings):
    loss = surrogate(logp, torch.zeros_like(logp).detach(), torch.tensor(advantage, dtype=logp.dtype), rows, **settings)
    return loss.tolist()


def test_clipped_surrogate_by_hand():
    logp, advantage, rows = log(1.5, 1.5, 0.5, 0.5, 1.1), [2.0, -2.0, 2.0, -2.0, 1.0], Rows([5])
    assert values(clipped_surrogate, logp, advantage, rows) == pytest.approx([-2.4, 3.0, -1.0, 1.6, -1.1])
    assert gradient(clipped_surrogate, logp, advantage, rows) == pytest.approx([0.0, 3.0, -1.0, 0.0, -1.1])


def test_clipped_surrogate_with_its_own_upper_clip():
    found = values(clipped_surrogate, log(1.25, 1.4), [1.0, 1.0], Rows([2]), high=0.28)
    assert found == pytest.approx([-1.25, -1.28])


def test_dual_clip_bounds_negative_advantages_only():
    logp, advantage = log(10.0, 10.0, 2.0), [-1.0, 1.0, -1.0]
    assert values(clipped_surrogate, logp, advantage, Rows([3]), dual=3.0) == pytest.approx([3.0, -1.2, 2.0])
    assert gradient(clipped_surrogate, logp, advantage, Rows([3]), dual=3.0) == pytest.approx([0.0, 0.0, 2.0])


def test_delta_bounds_the_ratio_first():
    logp, advantage = log(10.0, 2.0), [-1.0, -1.0]
    assert values(clipped_surrogate, logp, advantage, Rows([2]), delta=4.0) == pytest.approx([4.0, 2.0])
    assert gradient(clipped_surrogate, logp, advantage, Rows([2]), delta=4.0) == pytest.approx([0.0, 2.0])


def test_policy_gradient_by_hand_and_off_policy():
    logp, advantage = log(0.5, 4.0), [3.0, -1.0]
    assert values(policy_gradient, logp, advantage, Rows([2])) == pytest.approx([3 * math.log(2), math.log(4)])
    assert gradient(policy_gradient, logp, advantage, Rows([2])) == pytest.approx([-3.0, 1.0])
    assert gradient(policy_gradient, logp, advantage, Rows([2]), truncate=2.0) == pytest.approx([-1.5, 2.0])


def test_clipped_weight_keeps_a_gradient_for_every_action():
    logp, advantage = log(3.0, 0.5, 3.0), [1.0, 1.0, -1.0]
    assert gradient(clipped_weight, logp, advantage, Rows([3])) == pytest.approx([-1.2, -0.5, 1.2])
    assert gradient(clipped_weight, logp, advantage, Rows([3]), low=0.2) == pytest.approx([-1.2, -0.8, 1.2])


def test_sequence_clipped_has_one_ratio_a_completion():
    rows, logp = Rows([2, 0, 1]), log(4.0, 1.0, 0.5)  # geometric means 2 and 0.5
    assert values(sequence_clipped, logp, [1.0, 1.0, 1.0], rows, low=1.0, high=5.0) == pytest.approx([-2, -2, -0.5])
    assert gradient(sequence_clipped, logp, [1.0, 1.0, 1.0], rows, low=1.0, high=5.0) == pytest.approx([-2, -2, -0.5])
    assert values(sequence_clipped, logp, [1.0, 1.0, -1.0], rows, low=0.2, high=0.2) == pytest.approx([-1.2, -1.2, 0.8])
    assert gradient(sequence_clipped, logp, [1.0, 1.0, -1.0], rows, low=0.2, high=0.2) == [0.0, 0.0, 0.0]


def test_sequence_clipped_gradient_is_that_of_the_geometric_mean():
    """Summed over a completion: A·∇s·len, with s = exp(mean log ratio) as one differentiable number."""
    torch.manual_seed(0)
    logp = (0.1 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    rows, advantage = Rows([4, 2]), torch.tensor([1.5, -0.7], dtype=torch.float64)
    loss = sequence_clipped(logp, torch.zeros(6).double(), rows.spread(advantage), rows, low=9.0, high=9.0)
    found = torch.autograd.grad(loss.sum(), logp)[0]
    expected = torch.autograd.grad((-advantage * rows.mean(logp).exp() * rows.lengths_S).sum(), logp)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("surrogate", ALL)
def test_on_policy_every_gradient_is_the_policy_gradient(surrogate):
    torch.manual_seed(0)
    logp = torch.randn(9, dtype=torch.float64).requires_grad_()
    advantage = torch.randn(9, dtype=torch.float64)
    loss = surrogate(logp, logp.detach(), advantage, Rows([4, 0, 5]))
    assert torch.allclose(torch.autograd.grad(loss.sum(), logp)[0], -advantage, rtol=0, atol=1e-14)


@pytest.mark.parametrize("surrogate", ALL)
def test_completions_without_actions_survive(surrogate):
    logp = torch.zeros(0, requires_grad=True)
    for lengths in ([], [0, 0]):
        loss = surrogate(logp, logp.detach(), logp.detach(), Rows(lengths))
        assert loss.shape == (0,)
        loss.sum().backward()
    one = torch.tensor([-1.0], requires_grad=True)
    loss = surrogate(one, one.detach(), torch.tensor([2.0]), Rows([0, 1, 0]))
    loss.sum().backward()
    assert one.grad.tolist() == [-2.0]


@pytest.mark.parametrize("surrogate", ALL)
def test_absurd_log_ratios_stay_finite(surrogate):
    logp = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss = surrogate(logp, torch.tensor([0.0, -1e4]), torch.tensor([1.0, -1.0]), Rows([2]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()


@pytest.mark.parametrize("surrogate", ALL)
def test_number_formats(surrogate):
    logp = torch.tensor([-1.0, -2.0])
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        x = logp.to(given)
        assert surrogate(x, x - 0.25, torch.ones(2, dtype=given), Rows([2])).dtype == expected


def test_zero_advantage_is_zero_loss_and_zero_gradient():
    for surrogate in ALL:
        assert set(map(abs, values(surrogate, log(3.0, 0.1), [0.0, 0.0], Rows([2])))) == {0.0}
        assert set(map(abs, gradient(surrogate, log(3.0, 0.1), [0.0, 0.0], Rows([2])))) == {0.0}


def test_the_ratio_is_never_negative():
    assert (ratio(torch.linspace(-90, 0, 50), torch.zeros(50)) > 0).all()


def test_clipped_share_is_where_the_gradient_is_gone():
    logp, advantage = log(1.5, 1.5, 0.5, 0.5, 1.1, 0.9), [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    share = clipped_share(logp.detach(), torch.zeros(6).double(), torch.tensor(advantage))
    assert share.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    found = gradient(clipped_surrogate, logp, advantage, Rows([6]))
    assert [float(g == 0.0) for g in found] == share.tolist()
