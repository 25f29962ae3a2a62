"""What may be done to pairs before a loss, and how a reference follows the policy."""

import math
from dataclasses import replace

import pytest
import torch

from rlpost.objectives import PairBatch, Ragged, cpo, dpo, simpo
from rlpost.objectives.preference import apo_zero, ipo, nca, pairs_of, sppo
from rlpost.objectives.preference_modifiers import (
    confidence,
    f_divergence,
    length_desensitised,
    length_multipliers,
    mix,
    mix_lora,
    recompressed,
)

KINDS = ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


@pytest.fixture
def pair() -> PairBatch:
    """Δ_w = log 2 and Δ_l = −log 2, of two actions and of one."""
    delta = math.log(2)
    return PairBatch(
        *(torch.tensor([x], dtype=torch.float64) for x in ([delta - 3, -delta - 2], [-3.0, -2.0], [2.0, 1.0]))
    )


def f(kind: str, u: float, alpha: float) -> float:
    """The divergences' generators, up to their scale and c·(u − 1)."""
    return {
        "reverse_kl": u * math.log(u),
        "forward_kl": -math.log(u),
        "jensen_shannon": u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        "alpha": (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)) if alpha < 1 else -math.log(u),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_margins_are_differences_of_the_derivative_of_f(pair, kind):
    def slope(u: float) -> float:
        return (f(kind, u + 1e-5, 0.3) - f(kind, u - 1e-5, 0.3)) / 2e-5

    margin = f_divergence(pair, kind=kind, alpha=0.3).margin_P.item()
    assert margin == pytest.approx(slope(2.0) - slope(0.5), abs=1e-8)


def test_ratios_by_hand(pair):
    assert f_divergence(pair).delta_P2.tolist() == pair.delta_P2.tolist()
    assert f_divergence(pair, kind="forward_kl").delta_P2[0].tolist() == pytest.approx([0.5, -1.0])
    expected = [math.log(4 / 3), math.log(2 / 3)]
    assert f_divergence(pair, kind="jensen_shannon").delta_P2[0].tolist() == pytest.approx(expected)
    expected = [2 * (1 - 2**-0.5), 2 * (1 - 2**0.5)]
    assert f_divergence(pair, kind="alpha", alpha=0.5).delta_P2[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference_nothing_has_changed(kind):
    same = PairBatch(torch.full((1, 2), -3.0), torch.full((1, 2), -3.0), torch.ones(1, 2))
    assert f_divergence(same, kind=kind).delta_P2.tolist() == [[0.0, 0.0]]
    for loss in (dpo, nca, apo_zero, sppo, ipo):
        assert loss(f_divergence(same, kind=kind)).item() == loss(same).item()


def test_alpha_lies_between_the_two_kl(pair):
    small, one = (f_divergence(pair, kind="alpha", alpha=a).delta_P2 for a in (1e-9, 1.0))
    assert small[0].tolist() == pytest.approx(pair.delta_P2[0].tolist(), abs=1e-8)
    assert one.tolist() == f_divergence(pair, kind="forward_kl").delta_P2.tolist()
    for alpha in (0.0, 1.5):
        with pytest.raises(ValueError, match="between reverse KL"):
            f_divergence(pair, kind="alpha", alpha=alpha)
    with pytest.raises(ValueError, match="kind='chi': a divergence is reverse_kl"):
        f_divergence(pair, kind="chi")


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_have_gradients_and_stay_finite(kind):
    logp = torch.tensor([[-1.0, -2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: dpo(f_divergence(PairBatch(x, zero, zero + 1), kind=kind), beta=0.5), logp
    )
    far = torch.tensor([[-5000.0, 5000.0], [5000.0, -5000.0]], requires_grad=True)
    value = dpo(f_divergence(PairBatch(far, torch.zeros(2, 2), torch.ones(2, 2)), kind=kind))
    value.sum().backward()
    assert value.isfinite().all()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("loss", [simpo, cpo])
def test_losses_without_a_reference_do_not_feel_a_divergence(pair, loss):
    assert loss(f_divergence(pair, kind="forward_kl")).item() == loss(pair).item()


ROWS = Ragged([3, 1, 0, 2, 2, 2])
LOGP = torch.tensor([-1.0, -2.0, -4.0, -8.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0], dtype=torch.float64)
REFERENCE = LOGP + torch.tensor([0.5, 1.0, -0.25, 2.0, 0.5, -1.0, 0.25, 0.0, 0.0, 1.0], dtype=torch.float64)


def test_what_an_action_counts():
    assert length_multipliers(ROWS, 0.3).tolist() == [1.0, 0.3, 0.3, 1.0, 0.3, 0.3, 1.0, 1.0, 1.0, 1.0]
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            length_multipliers(ROWS, alpha)
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            length_desensitised(pairs_of(LOGP, REFERENCE, ROWS), alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitising_weighs_single_actions(alpha):
    factor = length_multipliers(ROWS, alpha)
    expected = pairs_of(factor * LOGP, factor * REFERENCE, ROWS).delta_P2
    found = length_desensitised(pairs_of(LOGP, REFERENCE, ROWS), alpha=alpha)
    assert torch.allclose(found.delta_P2, expected, rtol=0, atol=1e-15)
    assert torch.equal(found.logp_P2, pairs_of(LOGP, REFERENCE, ROWS).logp_P2)  # likelihoods stay what they are


def test_an_excess_of_any_length_counts_nothing_at_alpha_zero():
    logp = LOGP.clone().requires_grad_(True)
    dpo(length_desensitised(pairs_of(logp, REFERENCE, ROWS), alpha=0.0)).sum().backward()
    assert (logp.grad == 0).tolist() == [False, True, True, False, True, True, False, False, False, False]


def test_length_desensitising_needs_to_know_the_excess_and_comes_first(pair):
    with pytest.raises(ValueError, match="make them with pairs_of"):
        length_desensitised(pair)
    with pytest.raises(ValueError, match="before f_divergence"):
        length_desensitised(f_divergence(pairs_of(LOGP, REFERENCE, ROWS)))
    both = f_divergence(length_desensitised(pairs_of(LOGP, REFERENCE, ROWS)), kind="forward_kl")
    expected = 1 - (-length_desensitised(pairs_of(LOGP, REFERENCE, ROWS)).delta_P2).exp()
    assert torch.allclose(both.delta_P2, expected)


def test_confidence_by_hand():
    pairs = pairs_of(LOGP.requires_grad_(False), REFERENCE, ROWS)
    # Means −7/3 and −8; none and −3/2; −7/2 and −11/2.
    assert confidence(pairs).weight_P.tolist() == pytest.approx([math.exp(-31 / 3), math.exp(-1.5), math.exp(-9)])
    again = confidence(confidence(pairs)).weight_P
    assert again.tolist() == pytest.approx([math.exp(-62 / 3), math.exp(-3), math.exp(-18)])


def test_confidence_has_no_gradient():
    logp = LOGP.clone().requires_grad_(True)
    weighed = confidence(pairs_of(logp, REFERENCE, ROWS))
    assert not weighed.weight_P.requires_grad
    assert dpo(weighed).requires_grad


def test_aligned_a_uniform_policy_is_fully_confident_and_no_weight_is_above_one():
    uniform = torch.full((10,), -math.log(7), dtype=torch.float64)
    pairs = pairs_of(uniform, uniform, ROWS, collision_N=uniform)  # Σ p² = 1/7
    assert confidence(pairs).weight_P.tolist() == pytest.approx([1.0, 1.0, 1.0])
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    collision = torch.full((2,), (2 * p.log()).logsumexp(0).item(), dtype=torch.float64)
    likely, rare = (pairs_of(p[[i, i]].log(), torch.zeros(2), Ragged([1, 1]), collision) for i in (0, 2))
    assert confidence(likely).weight_P.item() == 1.0
    assert confidence(rare).weight_P.item() == pytest.approx((0.2 / 0.38) ** 2)


def test_mixed_weights_and_their_ends():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 4, 3)
    assert torch.equal(mix(policy, reference, 1.0), policy)
    assert torch.equal(mix(policy, reference, 0.0), reference)
    assert mix(torch.tensor([2.0]), torch.tensor([10.0]), 0.25).item() == 8.0
    assert mix(policy.bfloat16(), reference.bfloat16(), 0.5).dtype == torch.float32


def adapters() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return tuple(torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (6, 3), (2, 8), (6, 2)))


def test_adapters_are_mixed_by_their_products():
    a_policy, b_policy, a_reference, b_reference = adapters()
    a, b = mix_lora(a_policy, b_policy, a_reference, b_reference, 0.3)
    assert a.shape == (5, 8)
    assert b.shape == (6, 5)
    expected = mix(b_policy @ a_policy, b_reference @ a_reference, 0.3)
    assert torch.allclose(b @ a, expected, rtol=0, atol=1e-14)


def test_mixed_factors_are_another_matter():
    a, b, *_ = adapters()
    # Turned by an orthogonal matrix inside, the same product: its mixture with itself is itself, that of factors not.
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    a2, b2 = turn.T @ a, b @ turn
    stacked_a, stacked_b = mix_lora(a, b, a2, b2, 0.5)
    assert torch.allclose(stacked_b @ stacked_a, b @ a, rtol=0, atol=1e-13)
    assert ((b + b2) / 2 @ (a + a2) / 2 - b @ a).norm() / (b @ a).norm() > 0.3


def test_recompression_is_the_nearest_of_its_rank_and_says_its_error():
    a, b = mix_lora(*adapters(), 0.5)
    singular = torch.linalg.svdvals(b @ a)
    for rank in (1, 2, 4):
        small_a, small_b, error = recompressed(a, b, rank)
        assert small_a.shape == (rank, 8)
        assert small_b.shape == (6, rank)
        assert error == pytest.approx((singular[rank:].norm() / singular.norm()).item())
        lost = (b @ a - small_b @ small_a).norm() / (b @ a).norm()
        assert lost.item() == pytest.approx(error, abs=1e-13)


def test_recompression_loses_nothing_it_has_room_for():
    a, b = mix_lora(*adapters(), 0.5)
    for rank in (5, 9):
        full_a, full_b, error = recompressed(a, b, rank)
        assert full_a.shape == (rank, 8)
        assert full_b.shape == (6, rank)
        assert error < 1e-14
        assert torch.allclose(full_b @ full_a, b @ a, rtol=0, atol=1e-13)
    zero_a, zero_b, error = recompressed(torch.zeros_like(a), torch.zeros_like(b), 2)
    assert error == 0.0
    assert (zero_b @ zero_a).abs().max() == 0


def test_a_reference_that_is_refreshed_forever_stays_in_its_rank_and_comes_to_the_policy():
    a_policy, b_policy, a, b = adapters()
    for _ in range(60):
        a, b, _ = recompressed(*mix_lora(a_policy, b_policy, a, b, 0.5), 4)
    assert a.shape == (4, 8)
    assert torch.allclose(b @ a, b_policy @ a_policy, rtol=0, atol=1e-12)


def test_modifiers_leave_the_rest_alone(pair):
    for modified in (f_divergence(pair, kind="alpha"), confidence(pair)):
        assert modified.logp_P2 is pair.logp_P2
        assert replace(modified, ratio_P2=None, weight_P=None) == pair
