"""Supervised losses by hand."""

import math

import pytest
import torch

from rlpost.objectives.supervised import (
    confidence_weighted,
    dynamic_fine_tuning,
    forward_kl,
    jensen_shannon,
    label_smoothing,
    likelihood_by_label,
    log1mexp,
    nll,
    reverse_kl,
    unlikelihood,
)

DISTANCES = [forward_kl, reverse_kl, jensen_shannon]


def test_nll_by_hand():
    logp = torch.tensor([0.25, 1.0]).log().requires_grad_()
    assert nll(logp).tolist() == pytest.approx([math.log(4), 0.0])
    nll(logp).sum().backward()
    assert logp.grad.tolist() == [-1.0, -1.0]


def test_dynamic_fine_tuning_weighs_by_the_tokens_own_probability():
    logp = torch.tensor([0.25, 0.5], dtype=torch.float64).log().requires_grad_()
    loss = dynamic_fine_tuning(logp)
    assert loss.tolist() == pytest.approx([0.25 * math.log(4), 0.5 * math.log(2)])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-0.25, -0.5])


def test_its_gradient_raises_the_probability_itself():
    """−p·∇log p = −∇p: the loss descends on 1 − p."""
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(dynamic_fine_tuning(logits.log_softmax(0)[:1]).sum(), logits)[0]
    expected = torch.autograd.grad(-logits.softmax(0)[0], logits)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)


def test_confidence_weighted_learns_most_of_what_is_one_of_two():
    logp = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64).log().requires_grad_()
    loss = confidence_weighted(logp)
    assert loss.tolist() == pytest.approx([-p * (1 - p) * math.log(p) for p in (0.25, 0.5, 0.75)])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-3 / 16, -1 / 4, -3 / 16])


def test_confidence_weighted_keeps_its_digits_where_a_token_is_all_but_certain():
    logp = torch.tensor([-1e-9, -1e-30, 0.0, -200.0], dtype=torch.float64).requires_grad_()
    loss = confidence_weighted(logp)
    assert loss.tolist() == pytest.approx([1e-18, 1e-60, 0.0, 200 * math.exp(-200)], rel=1e-8, abs=0)
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-1e-9, -1e-30, 0.0, -math.exp(-200)], rel=1e-8, abs=0)


@pytest.mark.parametrize(
    "loss",
    [nll, dynamic_fine_tuning, confidence_weighted, unlikelihood, lambda x: likelihood_by_label(x, x < -1)],
    ids=["nll", "dynamic_fine_tuning", "confidence_weighted", "unlikelihood", "likelihood_by_label"],
)
def test_formats_and_nothing_at_all(loss):
    assert loss(torch.zeros(0)).shape == (0,)
    assert loss(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64
    assert loss(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def log(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def random_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64).log_softmax(-1)
    return student, teacher


def test_label_smoothing_by_hand():
    logp_NV = log([0.5, 0.25, 0.25]).requires_grad_()
    loss = label_smoothing(logp_NV[:, 0], logp_NV, epsilon=0.3)
    assert loss.item() == pytest.approx(0.7 * math.log(2) + 0.3 * (math.log(2) + 2 * math.log(4)) / 3)
    loss.sum().backward()
    assert logp_NV.grad[0].tolist() == pytest.approx([-0.8, -0.1, -0.1])


def test_label_smoothing_is_torchs():
    torch.manual_seed(0)
    logits, target_N = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 3, 5, 5])
    logp_NV = logits.log_softmax(-1)
    logp_N = logp_NV.gather(1, target_N[:, None])[:, 0]
    expected = torch.nn.functional.cross_entropy(logits, target_N, label_smoothing=0.2, reduction="none")
    assert torch.allclose(label_smoothing(logp_N, logp_NV, epsilon=0.2), expected, rtol=0, atol=1e-14)
    assert torch.equal(label_smoothing(logp_N, logp_NV, epsilon=0.0), nll(logp_N))


@pytest.mark.parametrize("epsilon", [-0.1, 1.0])
def test_label_smoothing_refuses_a_share_that_is_none(epsilon):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        label_smoothing(torch.zeros(1), torch.zeros(1, 2), epsilon=epsilon)


def test_unlikelihood_by_hand():
    logp = log([0.75, 0.2])[0].requires_grad_()
    loss = unlikelihood(logp)
    assert loss.tolist() == pytest.approx([math.log(4), -math.log(0.8)])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([3.0, 0.25])  # p/(1 − p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unlikelihood_of_the_certain_and_the_impossible_is_finite(dtype):
    logp = torch.tensor([0.0, -1e4], dtype=dtype, requires_grad=True)
    loss = unlikelihood(logp)
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(-math.log(torch.finfo(dtype).eps))
    assert loss[1].item() == 0.0
    assert logp.grad.isfinite().all()


def test_likelihood_by_label_by_hand():
    logp, label = log([0.75, 0.75, 0.2])[0].requires_grad_(), torch.tensor([True, False, False])
    loss = likelihood_by_label(logp, label, alpha=2.0)
    assert loss.tolist() == pytest.approx([-math.log(0.75), 2 * math.log(4), -2 * math.log(0.8)])
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-1.0, 6.0, 0.5])  # −1, and α·p/(1 − p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_certain_and_not_to_be_said_has_a_finite_loss_and_a_bounded_slope(dtype):
    """By the logits: α·p at the token itself, whatever p, also where 1 − p is a few bits."""
    logits = torch.tensor([[9.0, 0.0], [14.0, 0.0], [60.0, 0.0], [-60.0, 0.0]], dtype=dtype, requires_grad=True)
    label = torch.tensor([False, False, False, True])
    loss = likelihood_by_label(logits.log_softmax(1)[:, 0], label, alpha=0.5)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].tolist() == pytest.approx([0.5, -0.5], rel=1e-2)
    assert logits.grad.abs().max() <= 1.0
    assert logits.grad[3].tolist() == pytest.approx([-1.0, 1.0])


def test_likelihood_by_label_refuses_a_negative_weight():
    with pytest.raises(ValueError, match="0 or more"):
        likelihood_by_label(torch.zeros(1), torch.ones(1), alpha=-1.0)


def test_forward_and_reverse_kl_by_hand():
    student, teacher = log([0.5, 0.5]), log([0.25, 0.75])
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reverse = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert forward_kl(student, teacher).tolist() == pytest.approx([forward])
    assert reverse_kl(student, teacher).tolist() == pytest.approx([reverse])


def test_jensen_shannon_by_hand():
    # ¼·KL([0, 1] || m) + ¾·KL([1, 0] || m), m = [¾, ¼].
    found = jensen_shannon(log([1.0, 0.0]), log([0.0, 1.0]), mix=0.25)
    assert found.tolist() == pytest.approx([0.25 * math.log(4) + 0.75 * math.log(4 / 3)])


def test_jensen_shannons_limits_are_the_two_kls():
    student, teacher = random_distributions()
    for mix, limit in ((1e-6, forward_kl), (1 - 1e-6, reverse_kl)):
        scaled = jensen_shannon(student, teacher, mix=mix) / (mix * (1 - mix))
        assert torch.allclose(scaled, limit(student, teacher), rtol=1e-4, atol=0)


def test_jensen_shannon_is_symmetric_at_half_and_at_most_one_bit():
    student, teacher = random_distributions()
    found = jensen_shannon(student, teacher)
    assert torch.allclose(found, jensen_shannon(teacher, student), rtol=0, atol=1e-15)
    assert ((found > 0) & (found < math.log(2))).all()


@pytest.mark.parametrize("mix", [0.0, 1.0, -0.5])
def test_jensen_shannon_refuses_its_limits(mix):
    with pytest.raises(ValueError, match="strictly between"):
        jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2), mix=mix)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(distance):
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
    loss = distance(logits.log_softmax(-1), logits.detach().log_softmax(-1))
    loss.sum().backward()
    assert loss.abs().max() < 1e-15
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_of_distances_are_those_of_finite_differences(distance):
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distance(x.log_softmax(-1), teacher.log_softmax(-1)), logits)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_token_that_neither_may_say_changes_nothing(distance):
    student, teacher = torch.tensor([[0.3, 0.1]], requires_grad=True), torch.tensor([[0.3, 0.9]]).log_softmax(-1)
    barred = torch.tensor([[-torch.inf]])
    loss = distance(torch.cat([student, barred], 1).log_softmax(-1), torch.cat([teacher, barred], 1))
    without = distance(student.log_softmax(-1), teacher)
    assert loss.item() == pytest.approx(without.item())
    slope, expected = (torch.autograd.grad(x.sum(), student)[0] for x in (loss, without))
    assert torch.allclose(slope, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("distance", [*DISTANCES, lambda a, b: label_smoothing(a[:, 0], a)])
def test_formats_of_whole_distributions(distance):
    assert distance(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    student, teacher = (x.bfloat16() for x in random_distributions())
    assert torch.equal(distance(student, teacher), distance(student.float(), teacher.float()))
    assert distance(student.double(), teacher.double()).dtype == torch.float64


def test_log1mexp_keeps_its_digits_near_zero_and_far_from_it():
    x = torch.tensor([-1e-12, -1e-7, -math.log(2), -3.0, -40.0], dtype=torch.float64)
    expected = [math.log(1e-12), math.log(-math.expm1(-1e-7)), -math.log(2), math.log1p(-math.exp(-3)), -math.exp(-40)]
    assert log1mexp(x).tolist() == pytest.approx(expected, rel=1e-12)


def test_log1mexps_gradient_is_finite_on_either_branch():
    x = torch.tensor([-1e-3, -0.5, -1.0, -500.0], dtype=torch.float64, requires_grad=True)
    log1mexp(x).sum().backward()
    expected = [-math.exp(v) / -math.expm1(v) for v in (-1e-3, -0.5, -1.0, -500.0)]
    assert x.grad.tolist() == pytest.approx(expected, rel=1e-12)
