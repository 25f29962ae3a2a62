"""Preference losses: one pair by hand, and the identities among them."""

import math

import pytest
import torch

from rlpost.objectives import PairBatch, Ragged, cpo, dpo, dpo_robust, hinge, ipo, length_normalised, simpo
from rlpost.objectives.preference import (
    alphapo,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco,
    beyond_shorter,
    discopop,
    dpo_plackett_luce,
    exo,
    nca,
    orpo,
    pairs_of,
    sppo,
)

FIRST = [dpo, dpo_robust, ipo, hinge, length_normalised, simpo, cpo]
UP_AND_DOWN = [*FIRST, alphapo, exo, bco, sppo, apo_zero, discopop, orpo, aot_unpaired]
"""At the reference, or near it, their gradient raises the chosen one and lowers the rejected one."""
ALL = [*UP_AND_DOWN, nca, apo_down, aot]


def softplus(x: float) -> float:
    """−logσ(−x)."""
    return math.log1p(math.exp(x))


@pytest.fixture
def pair() -> PairBatch:
    """Δ_w = 1 over 2 actions, Δ_l = −3 over 4: h = 4, per action ½ and −¾."""
    return PairBatch(
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
    better, worse = (1 - math.exp(0.5)) / 0.5, (1 - math.exp(1.0)) / 0.5
    assert alphapo(pair, beta=2.0, gamma=0.5, alpha=0.5).item() == pytest.approx(softplus(0.5 - 2 * (better - worse)))
    linear = math.exp(-1.0) - math.exp(-2.0)
    assert alphapo(pair, beta=2.0, gamma=0.5, alpha=-1.0).item() == pytest.approx(softplus(0.5 - 2 * linear))
    assert cpo(pair, beta=0.5, alpha=0.25).item() == pytest.approx(softplus(-3.0) + 0.25 * 1.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_of_each_side_by_hand(pair):
    # β = ½: βΔ_w = ½, βΔ_l = −3/2, βh = 2.
    w, low = 0.5, -1.5
    assert nca(pair, beta=0.5).item() == pytest.approx(softplus(-w) + 0.5 * softplus(w) + 0.5 * softplus(low))
    assert bco(pair, beta=0.5).item() == pytest.approx(2 * softplus(-1.0))  # δ = −½: both are 1 away from it
    assert bco(pair, beta=0.5, delta=0.25).item() == pytest.approx(softplus(-0.25) + softplus(-1.75))
    assert sppo(pair, beta=0.5).item() == pytest.approx((1 - 1) ** 2 + (-3 + 1) ** 2)
    assert apo_zero(pair, beta=0.5).item() == pytest.approx(1 - sigmoid(w) + sigmoid(low))
    assert apo_down(pair, beta=0.5).item() == pytest.approx(sigmoid(w) + 1 - sigmoid(2.0))


def test_losses_of_the_margin_by_hand(pair):
    s = sigmoid(2.0 / 4)
    expected = (1 - s) * softplus(-2.0) + s * math.exp(-2.0)
    assert discopop(pair, beta=0.5, temperature=4.0).item() == pytest.approx(expected)
    p = sigmoid(2.0)
    expected = p * math.log(p / 0.9) + (1 - p) * math.log((1 - p) / 0.1)
    assert exo(pair, beta=0.5, epsilon=0.1).item() == pytest.approx(expected)


def test_exo_is_zero_where_the_margin_says_what_the_labels_do():
    h = math.log(0.8 / 0.2) / 0.1
    pairs = PairBatch(torch.tensor([[h, 0.0]], dtype=torch.float64), torch.zeros(1, 2), torch.ones(1, 2))
    assert exo(pairs, beta=0.1, epsilon=0.2).item() == pytest.approx(0, abs=1e-15)
    for epsilon in (0.0, 1e-4, 0.5):
        with pytest.raises(ValueError, match=r"from 1e-3"):
            exo(pairs, epsilon=epsilon)


def test_orpo_by_hand_and_close_to_certainty(pair):
    # Mean logp −1 and −2, p/(1 − p) = 1/(e − 1) and 1/(e² − 1).
    odds = math.log((math.e**2 - 1) / (math.e - 1))
    assert orpo(pair, beta=0.25).item() == pytest.approx(1 + 0.25 * softplus(-odds))
    sure = torch.tensor([[-1e-30, -3.0]], dtype=torch.float64, requires_grad=True)
    value = orpo(PairBatch(sure, torch.zeros(1, 2), torch.ones(1, 2)))
    value.sum().backward()
    assert 0 <= value.item() < 1e-10
    assert sure.grad.isfinite().all()


def test_aot_compares_what_has_the_same_rank():
    # Policy margins 3, 1, 2 and reference margins 0, 5, 4: ranks 2, 0, 1 meet 5, 0, 4.
    policy = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[0.0, 0.0], [5.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    pairs = PairBatch(policy, reference, torch.ones(3, 2))
    assert aot(pairs, beta=1.0).tolist() == pytest.approx([softplus(2.0), softplus(-1.0), softplus(2.0)])
    # Δ_w = 3, −4, −2 and Δ_l = 1, 0, −1 (say): the same ranks meet 1, −1, 0.
    pairs = PairBatch(policy + torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]]), reference, torch.ones(3, 2))
    assert aot_unpaired(pairs, beta=1.0).tolist() == pytest.approx([softplus(-2.0), softplus(3.0), softplus(2.0)])


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_aot_of_one_pair_is_dpo_and_does_not_depend_on_the_order(pair, loss):
    assert loss(pair).item() == pytest.approx(dpo(pair).item(), abs=1e-15)
    torch.manual_seed(0)
    many = PairBatch(*torch.randn(2, 6, 2, dtype=torch.float64), torch.ones(6, 2))
    turned = PairBatch(many.logp_P2.flip(0), many.reference_P2.flip(0), many.length_P2)
    assert loss(turned).tolist() == pytest.approx(loss(many).flip(0).tolist(), abs=1e-15)


@pytest.mark.parametrize("loss", [aot, aot_unpaired, bco])
def test_who_belongs_to_whom_does_not_matter_to_losses_of_distributions(loss):
    torch.manual_seed(1)
    logp, reference = torch.randn(2, 5, 2, dtype=torch.float64)
    pairs = PairBatch(logp, reference, torch.ones(5, 2))
    if loss is aot:  # the reference's margins are a distribution of their own
        other = PairBatch((logp - reference) + reference.roll(1, 0), reference.roll(1, 0), torch.ones(5, 2))
        back = aot(PairBatch(logp, reference.roll(1, 0), torch.ones(5, 2)))
        assert back.sum().item() == pytest.approx(aot(pairs).sum().item(), abs=1e-14)
        assert aot(other).sum().item() != pytest.approx(aot(pairs).sum().item(), abs=1e-3)
        return
    delta = logp - reference
    mixed = torch.stack([delta[:, 0], delta[:, 1].roll(2)], 1)
    rearranged = PairBatch(mixed, torch.zeros(5, 2), torch.ones(5, 2))
    assert loss(rearranged).sum().item() == pytest.approx(loss(pairs).sum().item(), abs=1e-14)


@pytest.mark.parametrize("loss", ALL)
def test_gradients_are_those_of_finite_differences(loss):
    torch.manual_seed(2)
    logp = -5 * torch.rand(4, 2, dtype=torch.float64) - 0.5
    reference = -5 * torch.rand(4, 2, dtype=torch.float64)
    lengths = torch.tensor([[2.0, 3.0], [1.0, 1.0], [4.0, 2.0], [5.0, 1.0]], dtype=torch.float64)
    given = {"delta": 0.1} if loss is bco else {}  # its own delta is without gradient
    assert torch.autograd.gradcheck(
        lambda x: loss(PairBatch(x, reference, lengths), beta=0.7, **given), logp.requires_grad_(True)
    )


def test_the_shift_of_bco_has_no_gradient(pair):
    logp = pair.logp_P2.clone().requires_grad_(True)
    bco(PairBatch(logp, pair.reference_P2, pair.length_P2), beta=0.5).sum().backward()
    assert logp.grad[0].tolist() == pytest.approx([-0.5 * sigmoid(-1.0), 0.5 * sigmoid(-1.0)])
    apart = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)  # δ = 1 at β = 1
    bco(PairBatch(apart, torch.zeros(2, 2), torch.ones(2, 2)), beta=1.0).sum().backward()
    assert apart.grad[0].tolist() == pytest.approx([-sigmoid(-2.0), sigmoid(-1.0)])
    assert apart.grad[1].tolist() == pytest.approx([-sigmoid(1.0), sigmoid(0.0)])


def test_discopop_stays_finite_at_any_temperature():
    logp = torch.tensor([[-9000.0, 0.0]], requires_grad=True)
    value = discopop(PairBatch(logp, torch.zeros(1, 2), torch.ones(1, 2)), beta=1.0, temperature=3.0)
    value.sum().backward()
    assert value.isfinite().all()
    assert logp.grad.isfinite().all()


def test_the_directions_of_the_anchored_losses():
    logp = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    for loss, signs in ((apo_zero, [-1, 1]), (apo_down, [0, 1]), (nca, [-1, 1])):
        (grad,) = torch.autograd.grad(loss(PairBatch(logp, torch.zeros(1, 2), torch.ones(1, 2))).sum(), logp)
        assert grad[0].sign().tolist() == signs, loss
    # Once the margin is won, APO-down lowers the chosen one too.
    won = torch.tensor([[0.0, -50.0]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(apo_down(PairBatch(won, torch.zeros(1, 2), torch.ones(1, 2))).sum(), won)
    assert grad[0, 0] > 0


def test_ranking_of_two_is_dpo(pair):
    torch.manual_seed(3)
    delta = torch.randn(4, 2, dtype=torch.float64)
    pairs = PairBatch(delta, torch.zeros(4, 2), torch.ones(4, 2))
    reward = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert dpo_plackett_luce(delta, reward, beta=0.3).tolist() == pytest.approx(
        dpo(pairs, beta=0.3).tolist(), abs=1e-15
    )
    assert dpo_plackett_luce(pair.delta_P2, reward[:1]).item() == pytest.approx(dpo(pair).item(), abs=1e-15)


def test_at_the_reference_dpo_is_log_two():
    logp = torch.tensor([[-2.0, -7.0], [-4.0, -1.0]], dtype=torch.float64, requires_grad=True)
    pairs = PairBatch(logp, logp.detach(), torch.ones(2, 2))
    for epsilon in (0.0, 0.3):
        assert dpo(pairs, epsilon=epsilon).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert length_normalised(pairs).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)
    assert hinge(pairs).tolist() == [1.0, 1.0]
    dpo(pairs, beta=0.1).sum().backward()
    assert logp.grad.flatten().tolist() == pytest.approx([-0.05, 0.05, -0.05, 0.05])  # ∓β/2


def test_the_robust_loss_is_unbiased_under_flipped_labels(pair):
    swapped = PairBatch(pair.logp_P2.flip(1), pair.reference_P2.flip(1), pair.length_P2.flip(1))
    mixed = 0.8 * dpo_robust(pair, epsilon=0.2) + 0.2 * dpo_robust(swapped, epsilon=0.2)
    assert mixed.item() == pytest.approx(dpo(pair).item(), abs=1e-15)


def test_the_robust_loss_refuses_a_flip_rate_of_one_half(pair):
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        dpo_robust(pair, epsilon=0.5)


@pytest.mark.parametrize(
    "loss",
    [dpo, length_normalised, ipo, hinge, exo, nca, bco, sppo, aot, aot_unpaired, apo_zero, apo_down, discopop],
)
def test_only_differences_to_the_reference_matter(pair, loss):
    shifted = PairBatch(pair.logp_P2 - 3, pair.reference_P2 - 3, pair.length_P2)
    assert loss(shifted).item() == pytest.approx(loss(pair).item(), abs=1e-14)


@pytest.mark.parametrize("loss", [simpo, alphapo, cpo, orpo])
def test_some_need_no_reference(pair, loss):
    assert loss(PairBatch(pair.logp_P2, pair.reference_P2 + 9, pair.length_P2)).item() == loss(pair).item()


@pytest.mark.parametrize("alpha", [0.0, 1e-14, -1e-14])
def test_alphapo_becomes_simpo(pair, alpha):
    bent, straight = alphapo(pair, beta=2.0, gamma=0.5, alpha=alpha), simpo(pair, beta=2.0, gamma=0.5)
    assert torch.equal(bent, straight) if alpha == 0 else bent.item() == pytest.approx(straight.item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, -1.0])
def test_alphapo_of_very_unlikely_completions_is_finite(alpha):
    """e^{200} is more than float32 holds; a likely one beside it is still learned."""
    logp_P2 = torch.tensor([[-2.0, -800.0], [-800.0, -2.0]], requires_grad=True)
    loss_P = alphapo(PairBatch(logp_P2, torch.zeros(2, 2), torch.full((2, 2), 4.0)), alpha=alpha)
    loss_P.sum().backward()
    assert loss_P.isfinite().all()
    assert logp_P2.grad.isfinite().all()
    assert logp_P2.grad[1, 1] > 0


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alphapo_refuses_a_shape_that_is_none(pair, alpha):
    with pytest.raises(ValueError, match="alpha bends the reward and is a finite number"):
        alphapo(pair, alpha=alpha)


def test_pairs_of_sums_actions_chosen_first():
    rows = Ragged([2, 1, 0, 3])
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    pairs = pairs_of(logp, torch.zeros(6), rows)
    assert pairs.logp_P2.tolist() == [[-3.0, -3.0], [0.0, -15.0]]
    assert pairs.length_P2.tolist() == [[2.0, 1.0], [0.0, 3.0]]
    with pytest.raises(ValueError, match="not pairs"):
        pairs_of(logp[:3], torch.zeros(3), Ragged([1, 1, 1]))


@pytest.mark.parametrize("loss", UP_AND_DOWN)
def test_an_empty_completion_survives_and_the_gradient_has_the_right_sign(loss):
    logp = torch.tensor([-1.0, -2.0, -3.0, -1.5], dtype=torch.float64, requires_grad=True)
    pairs = pairs_of(logp, torch.full((4,), -1.8, dtype=torch.float64), Ragged([1, 2, 0, 1]))
    value = loss(pairs)
    assert value.isfinite().all()
    assert value.dtype == torch.float64
    value.sum().backward()
    assert logp.grad.isfinite().all()
    assert logp.grad[0] < 0 < logp.grad[1]  # the chosen one rises, the rejected one falls
    assert logp.grad[1] == logp.grad[2]


@pytest.mark.parametrize("loss", ALL)
def test_no_pairs_and_half_precision(loss):
    assert loss(pairs_of(torch.zeros(0), torch.zeros(0), Ragged([]))).shape == (0,)
    narrow = torch.full((301,), -1.0, dtype=torch.bfloat16)
    pairs = pairs_of(narrow, narrow, Ragged([291, 10]))
    assert pairs.logp_P2.tolist() == [[-291.0, -10.0]]  # bfloat16 would stop at -256
    assert pairs.length_P2.tolist() == [[291.0, 10.0]]
    assert loss(pairs).dtype == torch.float32


def test_beyond_the_shorter_completion():
    rows = Ragged([3, 1, 0, 2, 2, 2])
    beyond = [False, True, True, False, True, True, False, False, False, False]
    assert beyond_shorter(rows).tolist() == beyond
    logp = torch.tensor([-1.0, -2.0, -4.0, -8.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0], dtype=torch.float64)
    pairs = pairs_of(logp, logp - 1, rows)
    assert pairs.excess_P2.tolist() == [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]


def test_a_table_holds_all_of_the_pairs():
    torch.manual_seed(4)
    rows = Ragged([3, 1, 0, 2])
    logp, reference, collision = -torch.rand(3, 6, dtype=torch.float64)
    for extra in (None, collision):
        pairs = pairs_of(logp, reference, rows, extra)
        back = PairBatch.from_table(pairs.table_PC)
        for name in ("logp_P2", "reference_P2", "length_P2", "excess_P2"):
            assert torch.equal(getattr(back, name), getattr(pairs, name)), name
        assert (back.collision_P2 is None) == (extra is None)
        assert extra is None or torch.equal(back.collision_P2, pairs.collision_P2)


def test_extreme_margins_stay_finite():
    logp = torch.tensor([[-5000.0, 0.0], [0.0, -5000.0]], requires_grad=True)
    total = torch.stack([loss(PairBatch(logp, torch.zeros(2, 2), torch.ones(2, 2))).sum() for loss in ALL]).sum()
    total.backward()
    assert total.isfinite()
    assert logp.grad.isfinite().all()
