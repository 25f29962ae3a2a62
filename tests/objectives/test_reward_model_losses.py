"""Scores from pairs and from whole rankings: by hand, against all orders, and the losses of steps."""

import math
from itertools import permutations

import pytest
import torch

from rlpost.objectives import PairBatch, dpo
from rlpost.objectives.reward_model import bradley_terry, plackett_luce, process_reward

NAN = math.nan


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def softplus(x: float) -> float:
    """−logσ(−x)."""
    return math.log1p(math.exp(x))


def probability(scores: list[float]) -> float:
    """That picking by e^score, without replacement, gives just this order."""
    weights = [math.exp(s) for s in scores]
    return math.prod(w / sum(weights[i:]) for i, w in enumerate(weights))


def test_bradley_terry_by_hand():
    score = tensor([[2.0, 1.0], [0.0, 3.0]])
    assert bradley_terry(score).tolist() == pytest.approx([softplus(-1.0), softplus(3.0)])
    assert bradley_terry(score, tensor([0.5, 1.0])).tolist() == pytest.approx([softplus(-0.5), softplus(4.0)])
    assert bradley_terry(score, centre=0.1).tolist() == pytest.approx([softplus(-1.0) + 0.9, softplus(3.0) + 0.9])


def test_the_centre_fixes_the_level_that_pairs_leave_free():
    score = tensor([[7.0, 5.0]]).requires_grad_(True)
    (grad,) = torch.autograd.grad(bradley_terry(score).sum(), score)
    assert grad.sum().item() == pytest.approx(0, abs=1e-15)
    (grad,) = torch.autograd.grad(bradley_terry(score, centre=0.01).sum(), score)
    assert grad.sum().item() == pytest.approx(0.01 * 4 * 12)


def test_dpo_is_bradley_terry_on_log_ratios():
    torch.manual_seed(0)
    logp, reference = torch.randn(2, 5, 2, dtype=torch.float64)
    expected = dpo(PairBatch(logp, reference, torch.ones(5, 2)), beta=0.3)
    assert bradley_terry(0.3 * (logp - reference)).tolist() == pytest.approx(expected.tolist(), abs=1e-15)


def test_a_ranking_of_two_is_bradley_terry():
    torch.manual_seed(1)
    score = torch.randn(6, 2, dtype=torch.float64)
    expected = bradley_terry(score)
    assert plackett_luce(score, tensor([[1.0, 0.0]]).expand(6, 2)).tolist() == pytest.approx(
        expected.tolist(), abs=1e-15
    )
    turned = plackett_luce(score.flip(1), tensor([[-2.0, 0.5]]).expand(6, 2))
    assert turned.tolist() == pytest.approx(expected.tolist(), abs=1e-15)


def test_a_ranking_is_the_probability_of_its_order():
    scores, rewards = [0.3, -1.0, 2.0, 0.7], [1.0, 5.0, -2.0, 3.0]
    order = sorted(range(4), key=lambda i: -rewards[i])
    expected = -math.log(probability([scores[i] for i in order]))
    assert plackett_luce(tensor([scores]), tensor([rewards])).item() == pytest.approx(expected, abs=1e-14)
    everything = sum(
        math.exp(-plackett_luce(tensor([scores]), tensor([p])).item()) for p in permutations([1.0, 2.0, 3.0, 4.0])
    )
    assert everything == pytest.approx(1, abs=1e-14)


def test_equals_are_not_compared_with_each_other():
    scores = tensor([[0.3, -1.0, 0.5]]).requires_grad_(True)
    value = plackett_luce(scores, tensor([[1.0, 1.0, 0.0]]))
    assert value.item() == pytest.approx(softplus(0.5 - 0.3) + softplus(0.5 + 1.0))
    value.sum().backward()
    alone = tensor([[0.3, 0.5]]).requires_grad_(True)
    plackett_luce(alone, tensor([[1.0, 0.0]])).sum().backward()
    assert scores.grad[0, 0].item() == pytest.approx(alone.grad[0, 0].item(), abs=1e-15)
    assert plackett_luce(torch.randn(1, 4), torch.ones(1, 4)).item() == 0.0
    # Well apart, equals cost nothing.
    assert plackett_luce(tensor([[40.0, 50.0, 0.0]]), tensor([[1.0, 1.0, 0.0]])).item() < 1e-15


def test_equals_bound_the_loss_with_all_their_orders_summed_out():
    torch.manual_seed(2)
    for scores in torch.randn(20, 5, dtype=torch.float64).tolist():
        summed = sum(
            probability([*(scores[i] for i in top), *(scores[i] for i in low)])
            for top in permutations([0, 1])
            for low in permutations([2, 3, 4])
        )
        bound = plackett_luce(tensor([scores]), tensor([[1.0, 1.0, 0.0, 0.0, 0.0]])).item()
        assert -math.log(summed) < bound < -math.log(summed) + 1.0


def test_the_order_of_a_group_and_of_its_equals_does_not_matter():
    torch.manual_seed(3)
    score, reward = torch.randn(3, 6, dtype=torch.float64), torch.randint(0, 3, (3, 6)).double()
    order = torch.randperm(6)
    expected = plackett_luce(score, reward)
    assert plackett_luce(score[:, order], reward[:, order]).tolist() == pytest.approx(expected.tolist(), abs=1e-14)
    assert plackett_luce(score + 100, 10 * reward - 3).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_the_unscored_are_absent():
    score = tensor([[0.3, 9.0, -1.0, 2.0]]).requires_grad_(True)
    value = plackett_luce(score, tensor([[1.0, NAN, 0.0, 2.0]]))
    value.sum().backward()
    assert value.item() == pytest.approx(plackett_luce(tensor([[0.3, -1.0, 2.0]]), tensor([[1.0, 0.0, 2.0]])).item())
    assert score.grad[0, 1].item() == 0.0
    assert score.grad.isfinite().all()
    assert plackett_luce(score, torch.full((1, 4), NAN)).item() == 0.0
    assert plackett_luce(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(4)
    score = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    reward = tensor([[1.0, 1.0, 0.0, 2.0], [0.0, NAN, 3.0, -1.0]])
    assert torch.autograd.gradcheck(lambda x: plackett_luce(x, reward), score)
    pairs, margin = score[:, :2].detach().requires_grad_(True), tensor([0.5, 0.0])
    assert torch.autograd.gradcheck(lambda x: bradley_terry(x, margin, centre=0.1), pairs)
    label = tensor([1.0, 0.0, 0.25, NAN])
    assert torch.autograd.gradcheck(lambda x: process_reward(x, label), score[0].detach().requires_grad_(True))


def test_steps_by_hand():
    logit = tensor([1.0, 1.0, -2.0, 5.0]).requires_grad_(True)
    value = process_reward(logit, tensor([1.0, 0.0, 0.25, NAN]))
    expected = [softplus(-1.0), softplus(1.0), 0.25 * softplus(2.0) + 0.75 * softplus(-2.0), 0.0]
    assert value.tolist() == pytest.approx(expected)
    value.sum().backward()
    assert logit.grad[3].item() == 0.0


def test_a_soft_label_is_learnt_as_the_probability_it_is():
    logit = tensor([math.log(0.3 / 0.7)]).requires_grad_(True)
    process_reward(logit, tensor([0.3])).sum().backward()
    assert logit.grad.item() == pytest.approx(0, abs=1e-15)


def test_extremes_and_half_precision():
    score = torch.tensor([[-5000.0, 5000.0, 0.0]], requires_grad=True)
    (plackett_luce(score, torch.tensor([[2.0, 1.0, 0.0]])) + bradley_terry(score[:, :2])).sum().backward()
    assert score.grad.isfinite().all()
    narrow = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    for value in (plackett_luce(narrow, narrow), bradley_terry(narrow), process_reward(narrow[0], narrow[0])):
        assert value.dtype == torch.float32
