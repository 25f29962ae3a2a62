"""Policy losses: values and gradients by hand, and the identities among them."""

import math

import pytest
import torch

from rlpost.objectives.ragged import Ragged
from rlpost.objectives.surrogates import (
    clipped_share,
    clipped_surrogate,
    clipped_weight,
    divergence_masked,
    geometric_mean,
    policy_gradient,
    ratio,
    sequence_clipped,
    soft_adaptive,
)
from rlpost.objectives.weights import sequence_mean

PER_ACTION = [policy_gradient, clipped_surrogate, clipped_weight, sequence_clipped, soft_adaptive, divergence_masked]
ALL = [*PER_ACTION, geometric_mean]


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
    logp, advantage, rows = log(1.5, 1.5, 0.5, 0.5, 1.1), [2.0, -2.0, 2.0, -2.0, 1.0], Ragged([5])
    assert values(clipped_surrogate, logp, advantage, rows) == pytest.approx([-2.4, 3.0, -1.0, 1.6, -1.1])
    assert gradient(clipped_surrogate, logp, advantage, rows) == pytest.approx([0.0, 3.0, -1.0, 0.0, -1.1])


def test_clipped_surrogate_with_its_own_upper_clip():
    found = values(clipped_surrogate, log(1.25, 1.4), [1.0, 1.0], Ragged([2]), clip_high=0.28)
    assert found == pytest.approx([-1.25, -1.28])


def test_dual_clip_bounds_negative_advantages_only():
    logp, advantage = log(10.0, 10.0, 2.0), [-1.0, 1.0, -1.0]
    assert values(clipped_surrogate, logp, advantage, Ragged([3]), dual=3.0) == pytest.approx([3.0, -1.2, 2.0])
    assert gradient(clipped_surrogate, logp, advantage, Ragged([3]), dual=3.0) == pytest.approx([0.0, 0.0, 2.0])


def test_delta_bounds_the_ratio_first():
    logp, advantage = log(10.0, 2.0), [-1.0, -1.0]
    assert values(clipped_surrogate, logp, advantage, Ragged([2]), delta=4.0) == pytest.approx([4.0, 2.0])
    assert gradient(clipped_surrogate, logp, advantage, Ragged([2]), delta=4.0) == pytest.approx([0.0, 2.0])


def test_policy_gradient_by_hand_and_off_policy():
    logp, advantage = log(0.5, 4.0), [3.0, -1.0]
    assert values(policy_gradient, logp, advantage, Ragged([2])) == pytest.approx([3 * math.log(2), math.log(4)])
    assert gradient(policy_gradient, logp, advantage, Ragged([2])) == pytest.approx([-3.0, 1.0])
    assert gradient(policy_gradient, logp, advantage, Ragged([2]), truncate=2.0) == pytest.approx([-1.5, 2.0])


def test_clipped_weight_keeps_a_gradient_for_every_action():
    logp, advantage = log(3.0, 0.5, 3.0), [1.0, 1.0, -1.0]
    assert gradient(clipped_weight, logp, advantage, Ragged([3])) == pytest.approx([-1.2, -0.5, 1.2])
    assert gradient(clipped_weight, logp, advantage, Ragged([3]), clip_low=0.2) == pytest.approx([-1.2, -0.8, 1.2])


def test_sequence_clipped_has_one_ratio_a_completion():
    rows, logp = Ragged([2, 0, 1]), log(4.0, 1.0, 0.5)  # geometric means 2 and 0.5
    assert values(sequence_clipped, logp, [1.0, 1.0, 1.0], rows, clip_low=1.0, clip_high=5.0) == pytest.approx(
        [-2, -2, -0.5]
    )
    assert gradient(sequence_clipped, logp, [1.0, 1.0, 1.0], rows, clip_low=1.0, clip_high=5.0) == pytest.approx(
        [-2, -2, -0.5]
    )
    assert values(sequence_clipped, logp, [1.0, 1.0, -1.0], rows, clip_low=0.2, clip_high=0.2) == pytest.approx(
        [-1.2, -1.2, 0.8]
    )
    assert gradient(sequence_clipped, logp, [1.0, 1.0, -1.0], rows, clip_low=0.2, clip_high=0.2) == [0.0, 0.0, 0.0]


def test_sequence_clipped_gradient_is_that_of_the_geometric_mean():
    """Summed over a completion: A·∇s·len, with s = exp(mean log ratio) as one differentiable number."""
    torch.manual_seed(0)
    logp = (0.1 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    rows, advantage = Ragged([4, 2]), torch.tensor([1.5, -0.7], dtype=torch.float64)
    loss = sequence_clipped(logp, torch.zeros(6).double(), rows.spread(advantage), rows, clip_low=9.0, clip_high=9.0)
    found = torch.autograd.grad(loss.sum(), logp)[0]
    expected = torch.autograd.grad((-advantage * rows.mean(logp).exp() * rows.lengths_S).sum(), logp)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("surrogate", PER_ACTION)
def test_on_policy_every_gradient_is_the_policy_gradient(surrogate):
    torch.manual_seed(0)
    logp = torch.randn(9, dtype=torch.float64).requires_grad_()
    advantage = torch.randn(9, dtype=torch.float64)
    loss = surrogate(logp, logp.detach(), advantage, Ragged([4, 0, 5]))
    assert torch.allclose(torch.autograd.grad(loss.sum(), logp)[0], -advantage, rtol=0, atol=1e-14)


@pytest.mark.parametrize("surrogate", ALL)
def test_completions_without_actions_survive(surrogate):
    logp = torch.zeros(0, requires_grad=True)
    for lengths in ([], [0, 0]):
        loss = surrogate(logp, logp.detach(), logp.detach(), Ragged(lengths))
        assert loss.shape == (0,)
        loss.sum().backward()
    one = torch.tensor([-1.0], requires_grad=True)
    loss = surrogate(one, one.detach(), torch.tensor([2.0]), Ragged([0, 1, 0]))
    loss.sum().backward()
    assert one.grad.tolist() == [-2.0]


@pytest.mark.parametrize("surrogate", ALL)
def test_absurd_log_ratios_stay_finite(surrogate):
    logp = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss = surrogate(logp, torch.tensor([0.0, -1e4]), torch.tensor([1.0, -1.0]), Ragged([2]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()


@pytest.mark.parametrize("surrogate", ALL)
def test_number_formats(surrogate):
    logp = torch.tensor([-1.0, -2.0])
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        x = logp.to(given)
        assert surrogate(x, x - 0.25, torch.ones(2, dtype=given), Ragged([2])).dtype == expected


def test_zero_advantage_is_zero_loss_and_zero_gradient():
    for surrogate in ALL:
        assert set(map(abs, values(surrogate, log(3.0, 0.1), [0.0, 0.0], Ragged([2])))) == {0.0}
        assert set(map(abs, gradient(surrogate, log(3.0, 0.1), [0.0, 0.0], Ragged([2])))) == {0.0}


def test_the_ratio_is_never_negative():
    assert (ratio(torch.linspace(-90, 0, 50), torch.zeros(50)) > 0).all()


def test_clipped_share_is_where_the_gradient_is_gone():
    logp, advantage = log(1.5, 1.5, 0.5, 0.5, 1.1, 0.9), [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    share = clipped_share(logp.detach(), torch.zeros(6).double(), torch.tensor(advantage))
    assert share.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    found = gradient(clipped_surrogate, logp, advantage, Ragged([6]))
    assert [float(g == 0.0) for g in found] == share.tolist()


def test_dual_and_delta_together_take_the_smaller_bound():
    logp, advantage = log(10.0, 10.0), [-1.0, -1.0]
    assert values(clipped_surrogate, logp, advantage, Ragged([2]), dual=3.0, delta=4.0) == pytest.approx([3.0, 3.0])
    assert values(clipped_surrogate, logp, advantage, Ragged([2]), dual=5.0, delta=4.0) == pytest.approx([4.0, 4.0])


def test_delta_leaves_positive_advantages_to_the_clip():
    found = gradient(clipped_surrogate, log(1.1, 10.0, 0.5), [1.0, 1.0, 1.0], Ragged([3]), delta=4.0)
    assert found == pytest.approx([-1.1, 0.0, -0.5])


def test_geometric_mean_by_hand():
    # Completions of log-ratios (0.2, 0.1), none and (−0.3), inside the clip.
    logp, rows = torch.tensor([0.2, 0.1, -0.3], dtype=torch.float64, requires_grad=True), Ragged([2, 0, 1])
    first, last = 2 * math.exp(0.15), -math.exp(-0.3)
    assert values(geometric_mean, logp, [2.0, 2.0, -1.0], rows) == pytest.approx([-first, -first, -last])
    # The value stands at each of a completion's actions: summed, every action has the whole slope −A·s.
    assert gradient(geometric_mean, logp, [2.0, 2.0, -1.0], rows) == pytest.approx([-first, -first, -last])


def test_geometric_mean_clips_in_log_space_on_the_pessimistic_side():
    logp, rows = torch.tensor([0.9, -0.9, 0.1], dtype=torch.float64, requires_grad=True), Ragged([3])
    # A > 0: 0.9 is held at 0.4, −0.9 is not; A < 0: the other way round.
    up, down = math.exp((0.4 - 0.9 + 0.1) / 3), math.exp((0.9 - 0.4 + 0.1) / 3)
    assert values(geometric_mean, logp, [1.0] * 3, rows) == pytest.approx([-up] * 3)
    assert gradient(geometric_mean, logp, [1.0] * 3, rows) == pytest.approx([0.0, -up, -up])
    assert values(geometric_mean, logp, [-1.0] * 3, rows) == pytest.approx([down] * 3)
    assert gradient(geometric_mean, logp, [-1.0] * 3, rows) == pytest.approx([down, 0.0, down])
    wide = math.exp((0.5 - 0.9 + 0.1) / 3)
    assert values(geometric_mean, logp, [1.0] * 3, rows, clip_low=0.1, clip_high=0.5) == pytest.approx([-wide] * 3)


def test_on_policy_its_gradient_is_the_policy_gradient_as_a_sequence_mean():
    torch.manual_seed(0)
    logp, rows = torch.randn(9, dtype=torch.float64).requires_grad_(), Ragged([4, 0, 5])
    advantage = rows.spread(torch.tensor([1.5, 3.0, -0.7], dtype=torch.float64))
    loss = geometric_mean(logp, logp.detach(), advantage, rows)
    found = torch.autograd.grad((loss * sequence_mean(rows)).sum(), logp)[0]
    assert torch.allclose(found, -advantage * sequence_mean(rows), rtol=0, atol=1e-15)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_soft_adaptive_by_hand():
    logp, advantage = log(1.5, 1.5, 0.5), [2.0, -2.0, 1.0]
    expected = [-4 * sigmoid(0.5) * 2, 4 / 1.05 * sigmoid(1.05 * 0.5) * 2, -4 * sigmoid(-0.5)]
    assert values(soft_adaptive, logp, advantage, Ragged([3])) == pytest.approx(expected)
    # ∇ = −4·σ·(1 − σ)·r·A, τ cancels.
    up, down = sigmoid(0.5) * sigmoid(-0.5), sigmoid(0.525) * sigmoid(-0.525)
    slopes = [-4 * up * 1.5 * 2, 4 * down * 1.5 * 2, -4 * up * 0.5]
    assert gradient(soft_adaptive, logp, advantage, Ragged([3])) == pytest.approx(slopes)


def test_soft_adaptive_takes_tau_by_the_advantages_sign():
    settings = {"tau_positive": 2.0, "tau_negative": 3.0}
    found = values(soft_adaptive, log(2.0, 2.0), [1.0, -1.0], Ragged([2]), **settings)
    assert found == pytest.approx([-2 * sigmoid(2.0), 4 / 3 * sigmoid(3.0)])
    far = gradient(soft_adaptive, log(50.0), [1.0], Ragged([1]), **settings)
    assert abs(far[0]) < 1e-30  # a soft clip: far away the gradient fades


def test_divergence_masked_by_hand():
    # Probabilities .1 → .4, .4 → .1 and .01 → .05: changes of .3, −.3 and .04 at ratios of 4, ¼ and 5.
    new = torch.tensor([0.4, 0.4, 0.1, 0.1, 0.05], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([0.1, 0.1, 0.4, 0.4, 0.01], dtype=torch.float64).log()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    loss = divergence_masked(new, old, advantage, Ragged([5]))
    expected = [0.0, 4.0, -0.25, 0.0, -5.0]  # dropped only where it has moved the way it is pushed
    assert loss.tolist() == pytest.approx(expected)
    assert torch.autograd.grad(loss.sum(), new)[0].tolist() == pytest.approx(expected)


def test_divergence_masked_by_another_threshold():
    new, old = (torch.tensor([p, p], dtype=torch.float64).log() for p in (0.4, 0.3))
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert divergence_masked(new, old, advantage, Ragged([2])).tolist() == pytest.approx([-4 / 3, 4 / 3])
    assert divergence_masked(new, old, advantage, Ragged([2]), threshold=0.05).tolist() == pytest.approx([0.0, 4 / 3])
