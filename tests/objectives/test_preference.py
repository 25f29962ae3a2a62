"""Preference losses: one pair by hand, and the identities among them."""

import math

import pytest
import torch

from rlpost.objectives import Pairs, Rows, cpo, dpo, dpo_robust, hinge, ipo, length_normalised, simpo
from rlpost.objectives.preference import pairs_of

ALL = [dpo, dpo_robust, ipo, hinge, length_normalised, simpo, cpo]


def softplus(x: float) -> float:
    """−logσ(−x)."""
    return math.log1p(math.exp(x))


@pytest.fixture
def pair() -> Pairs:
    """Δ_w = 1 over 2 actions, Δ_l = −3 over 4: h = 4, per action ½ and −¾."""
    return Pairs(
        torch.tensor([[-2.0, -8.0]], dtype=torch.float64),
        torch.tensor([[-3.0, -5.0]], dtype=torch.float64),
        torch.tensor([[2.0, 4.0]], dtype=torch.float64),
    )


def test_margins_by_hand(pair):
    assert pair.delta_P2.tolist() == [[1.0, -3.0]]
    assert pair.margin_P.tolist() == [4.0]
    assert pair.mean_logp_P2.tolist() == [[-1.0, -2.0]]
    assert pair.mean_delta_P2.tolist() == [[0.5, -0.75]]


def test_losses_by_hand(pair):
    plain, flipped = softplus(-2.0), softplus(2.0)  # β = ½, βh = 2
    assert dpo(pair, beta=0.5).item() == pytest.approx(plain)
    assert dpo(pair, beta=0.5, epsilon=0.1).item() == pytest.approx(0.9 * plain + 0.1 * flipped)
    assert dpo_robust(pair, beta=0.5, epsilon=0.1).item() == pytest.approx((0.9 * plain - 0.1 * flipped) / 0.8)
    assert ipo(pair, beta=0.5).item() == pytest.approx((1.25 - 1) ** 2)
    assert ipo(pair, beta=0.5, summed=True).item() == pytest.approx((4 - 1) ** 2)
    assert hinge(pair, beta=0.1).item() == pytest.approx(0.6)
    assert hinge(pair, beta=0.5).item() == 0.0
    assert length_normalised(pair, beta=2.0).item() == pytest.approx(softplus(-2.5))
    assert simpo(pair, beta=2.0, gamma=0.5).item() == pytest.approx(softplus(-1.5))
    assert cpo(pair, beta=0.5, alpha=0.25).item() == pytest.approx(softplus(-3.0) + 0.25 * 1.0)


def test_at_the_reference_dpo_is_log_two():
    logp = torch.tensor([[-2.0, -7.0], [-4.0, -1.0]], dtype=torch.float64, requires_grad=True)
    pairs = Pairs(logp, logp.detach(), torch.ones(2, 2))
    for epsilon in (0.0, 0.3):
        assert dpo(pairs, epsilon=epsilon).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert length_normalised(pairs).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert hinge(pairs).tolist() == [1.0, 1.0]
    dpo(pairs, beta=0.1).sum().backward()
    assert logp.grad.flatten().tolist() == pytest.approx([-0.05, 0.05, -0.05, 0.05])  # ∓β/2


def test_the_robust_loss_is_unbiased_under_flipped_labels(pair):
    swapped = Pairs(pair.logp_P2.flip(1), pair.reference_P2.flip(1), pair.length_P2.flip(1))
    mixed = 0.8 * dpo_robust(pair, epsilon=0.2) + 0.2 * dpo_robust(swapped, epsilon=0.2)
    assert mixed.item() == pytest.approx(dpo(pair).item(), abs=1e-15)


def test_the_robust_loss_refuses_a_flip_rate_of_one_half(pair):
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        dpo_robust(pair, epsilon=0.5)


@pytest.mark.parametrize("loss", [dpo, length_normalised, ipo, hinge])
def test_only_differences_to_the_reference_matter(pair, loss):
    shifted = Pairs(pair.logp_P2 - 3, pair.reference_P2 - 3, pair.length_P2)
    assert loss(shifted).item() == pytest.approx(loss(pair).item(), abs=1e-14)


@pytest.mark.parametrize("loss", [simpo, cpo])
def test_some_need_no_reference(pair, loss):
    assert loss(Pairs(pair.logp_P2, pair.reference_P2 + 9, pair.length_P2)).item() == loss(pair).item()


def test_pairs_of_sums_actions_chosen_first():
    rows = Rows([2, 1, 0, 3])
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    pairs = pairs_of(logp, torch.zeros(6), rows)
    assert pairs.logp_P2.tolist() == [[-3.0, -3.0], [0.0, -15.0]]
    assert pairs.length_P2.tolist() == [[2.0, 1.0], [0.0, 3.0]]
    with pytest.raises(ValueError, match="not pairs"):
        pairs_of(logp[:3], torch.zeros(3), Rows([1, 1, 1]))


@pytest.mark.parametrize("loss", ALL)
def test_an_empty_completion_survives_and_the_gradient_has_the_right_sign(loss):
    logp = torch.tensor([-1.0, -2.0, -3.0, -1.5], dtype=torch.float64, requires_grad=True)
    pairs = pairs_of(logp, torch.full((4,), -1.8, dtype=torch.float64), Rows([1, 2, 0, 1]))
    value = loss(pairs)
    assert value.isfinite().all()
    assert value.dtype == torch.float64
    value.sum().backward()
    assert logp.grad.isfinite().all()
    assert logp.grad[0] < 0 < logp.grad[1]  # the chosen one rises, the rejected one falls
    assert logp.grad[1] == logp.grad[2]


@pytest.mark.parametrize("loss", ALL)
def test_no_pairs_and_half_precision(loss):
    assert loss(pairs_of(torch.zeros(0), torch.zeros(0), Rows([]))).shape == (0,)
    narrow = torch.full((301,), -1.0, dtype=torch.bfloat16)
    pairs = pairs_of(narrow, narrow, Rows([291, 10]))
    assert pairs.logp_P2.tolist() == [[-291.0, -10.0]]  # bfloat16 would stop at -256
    assert pairs.length_P2.tolist() == [[291.0, 10.0]]
    assert loss(pairs).dtype == torch.float32


def test_extreme_margins_stay_finite():
    logp = torch.tensor([[-5000.0, 0.0], [0.0, -5000.0]], requires_grad=True)
    total = torch.stack([loss(Pairs(logp, torch.zeros(2, 2), torch.ones(2, 2))).sum() for loss in ALL]).sum()
    total.backward()
    assert total.isfinite()
    assert logp.grad.isfinite().all()
