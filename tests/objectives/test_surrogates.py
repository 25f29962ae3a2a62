"""Policy losses: values and gradients by hand, and the identities among them."""

import math
from functools import partial

import pytest
import torch

from rlpost.objectives.ragged import Ragged
from rlpost.objectives.surrogates import (
    clipped_share,
    clipped_surrogate,
    clipped_weight,
    divergence_masked,
    future_weighted,
    geometric_mean,
    policy_gradient,
    ratio,
    sequence_clipped,
    sequence_soft,
    soft_adaptive,
    squared_log_ratio,
    tapered,
)
from rlpost.objectives.weights import sequence_mean

squared = partial(squared_log_ratio, tau=0.5)
VANISHING = [policy_gradient, clipped_surrogate, clipped_weight, sequence_clipped, soft_adaptive, divergence_masked]
VANISHING += [sequence_soft, tapered, future_weighted]
PER_ACTION = [*VANISHING, squared]
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
    for surrogate in [*VANISHING, geometric_mean]:
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


def test_divergence_masked_by_the_divergence_of_an_action_and_all_others():
    # KL(.1 ‖ .4) = .2263 and KL(.4 ‖ .1) = .3112: not the same both ways, as |Δp| is.
    new, old = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]))
    masked = partial(divergence_masked, divergence="kl")
    found = [
        masked(new, old, torch.tensor([1.0, -1.0] * 2), Ragged([4]), threshold=t).tolist() for t in (0.2, 0.3, 0.4)
    ]
    assert found[0] == pytest.approx([0.0, 4.0, -0.25, 0.0])
    assert found[1] == pytest.approx([-4.0, 4.0, -0.25, 0.0])
    assert found[2] == pytest.approx([-4.0, 4.0, -0.25, 0.25])


def test_divergence_masked_where_an_action_has_become_certain():
    logp = torch.zeros(3, requires_grad=True)
    old, advantage = torch.tensor([0.5, 0.5, 1.0]).log(), torch.tensor([1.0, -1.0, 1.0])
    loss = divergence_masked(logp, old, advantage, Ragged([3]), divergence="kl", threshold=9.0)
    assert loss.tolist() == [0.0, 2.0, -1.0]
    loss.sum().backward()
    assert logp.grad.tolist() == [0.0, 2.0, -1.0]


def test_another_divergence_is_refused():
    with pytest.raises(ValueError, match="divergence='js'"):
        divergence_masked(torch.zeros(1), torch.zeros(1), torch.ones(1), Ragged([1]), divergence="js")


def test_completions_left_behind_are_not_pushed_further():
    # Mean log-ratios of −½log 8 = −1.04 and −log 2 = −.69 nats an action.
    logp, rows = log(0.5, 0.25, 0.5), Ragged([2, 0, 1])
    masked = partial(clipped_surrogate, clip_low=0.9, clip_high=0.9, off_policy_limit=1.0)
    assert gradient(masked, logp, [-1.0, -1.0, -1.0], rows) == pytest.approx([0.0, 0.0, 0.5])
    assert gradient(masked, logp, [1.0, -1.0, -1.0], rows) == pytest.approx([-0.5, 0.0, 0.5])
    assert gradient(partial(masked, off_policy_limit=1.1), logp, [-1.0] * 3, rows) == pytest.approx([0.5, 0.25, 0.5])
    # What has become likelier is never left out.
    assert gradient(partial(masked, off_policy_limit=0.0), log(1.5), [-1.0], Ragged([1])) == pytest.approx([1.5])


def test_sequence_soft_by_hand():
    logp, rows = log(4.0, 1.0, 0.5), Ragged([2, 0, 1])  # W = 4 and .5
    up, down = 4**2 * math.exp(3 * (1 - 4)), 0.5**3 * math.exp(2 * (1 - 0.5))
    assert gradient(sequence_soft, logp, [2.0, 2.0, -1.0], rows) == pytest.approx([-2 * up, -2 * up, down])
    assert values(sequence_soft, logp, [2.0, 2.0, -1.0], rows) == pytest.approx(
        [-2 * up * math.log(4), 0.0, -down * math.log(2)]
    )
    settings = {"k_positive": 1.0, "lambda_positive": 0.5, "k_negative": 0.0, "lambda_negative": 0.25}
    up, down = 0.5 * math.exp(0.25), math.exp(0.25 * (1 - 4))
    assert gradient(sequence_soft, logp, [-1.0, -1.0, 1.0], rows, **settings) == pytest.approx([down, down, -up])


def test_sequence_soft_is_greatest_at_k_over_lambda():
    weight = [-gradient(sequence_soft, log(w), [1.0], Ragged([1]))[0] for w in (0.5, 0.6, 2 / 3, 0.75, 1.0)]
    assert max(weight) == weight[2]
    assert weight[4] == 1.0


def test_sequence_soft_of_a_hopeless_ratio_is_nothing():
    for logp in (-500.0, 500.0):
        found = gradient(sequence_soft, torch.tensor([logp], requires_grad=True), [1.0], Ragged([1]), k_positive=9.0)
        assert abs(found[0]) < 1e-30


def test_tapered_by_hand():
    logp, rows = log(4.0, 1.0, 0.5), Ragged([2, 0, 1])
    assert gradient(tapered, logp, [2.0, 2.0, 1.0], rows) == pytest.approx([-2.0, -2.0, -1.0])
    assert gradient(tapered, logp, [-2.0, -2.0, -1.0], rows) == pytest.approx([2.0, 2.0, 0.5])
    assert gradient(tapered, logp, [-2.0, 2.0, -1.0], rows, cap=3.0) == pytest.approx([6.0, -2.0, 0.5])
    assert values(tapered, logp, [2.0, 2.0, -1.0], rows) == pytest.approx([-2 * math.log(4), 0.0, -0.5 * math.log(2)])


def test_squared_log_ratio_by_hand():
    logp, rows = log(4.0, 0.5, 2.0), Ragged([2, 0, 1])  # both completions' log-ratios sum to log 2
    square = 0.25 * math.log(2) ** 2
    expected = [-3 * math.log(4) + square / 2, 3 * math.log(2) + square / 2, math.log(2) + square]
    assert values(squared, logp, [3.0, 3.0, -1.0], rows) == pytest.approx(expected)
    slope = 0.5 * math.log(2)
    assert gradient(squared, logp, [3.0, 3.0, -1.0], rows) == pytest.approx([slope - 3, slope - 3, slope + 1])


def test_future_weighted_by_hand():
    logp, rows = torch.tensor([0.2, -0.2, 0.1, 0.05], dtype=torch.float64, requires_grad=True), Ragged([3, 1])
    # With γ = ½ the first completion's sums are .2 − .1 + .025, −.2 + .05 and .1; the second's is .05.
    sums = [0.125, -0.15, 0.1, 0.05]
    one_sided = [max(math.exp(x), 1.0) for x in sums]
    expected = [-f * math.exp(x) for f, x in zip(one_sided, logp.tolist(), strict=True)]
    assert gradient(future_weighted, logp, [1.0] * 4, rows, half_life=1.0) == pytest.approx(expected)
    bounded = [1.1, 0.9, 1.1, math.exp(0.05)]
    expected = [2 * f * math.exp(x) for f, x in zip(bounded, logp.tolist(), strict=True)]
    settings = {"half_life": 1.0, "influence_low": 0.1, "influence_high": 0.1, "clip_low": 0.3}
    assert gradient(future_weighted, logp, [-2.0] * 4, rows, **settings) == pytest.approx(expected)
    assert values(future_weighted, logp, [-2.0] * 4, rows, **settings) == pytest.approx(expected)
    # A half-life of 2 is γ = √½.
    first = math.exp(0.2 - 0.2 * math.sqrt(0.5) + 0.1 * 0.5)
    found = gradient(future_weighted, logp, [1.0] * 4, rows, half_life=2.0, influence_high=0.9)
    assert found[0] == pytest.approx(-first * math.exp(0.2))


def test_future_weighted_leaves_out_what_has_moved_too_far_and_clips():
    logp, rows = log(1.1, 4.0), Ragged([2])
    near, far = (gradient(future_weighted, logp, [1.0, 1.0], rows, dual=d, half_life=1.0) for d in (5.0, 3.0))
    assert near == pytest.approx([-1.1 * 1.2, 0.0])
    assert far == pytest.approx([-1.1 * 1.1, 0.0])
    # Beyond `dual` a negative advantage has no gradient either; its bound is weighted too.
    assert gradient(future_weighted, logp, [-1.0, -1.0], rows, dual=3.0, half_life=1.0)[1] == 0.0
    assert values(future_weighted, logp, [-1.0, -1.0], rows, dual=3.0, half_life=1.0)[1] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("surrogate", "wrong"),
    [
        (sequence_soft, {"lambda_negative": -0.1}),
        (squared_log_ratio, {"tau": -0.1}),
        (future_weighted, {"half_life": 0.0}),
        (future_weighted, {"dual": 1.0}),
        (future_weighted, {"influence_low": 1.1}),
    ],
)
def test_settings_without_a_sense_are_refused(surrogate, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).partition("_")[0]):
        surrogate(torch.zeros(1), torch.zeros(1), torch.ones(1), Ragged([1]), **wrong)


def test_the_future_is_a_completions_own():
    logp, rows = log(1.1, 1.2, 1.1), Ragged([1, 2])
    alone = gradient(future_weighted, log(1.1), [1.0], Ragged([1]))
    assert gradient(future_weighted, logp, [1.0] * 3, rows)[:1] == alone
