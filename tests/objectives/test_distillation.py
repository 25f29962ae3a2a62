"""Folding to a teacher's likeliest tokens, and what is to come, by hand."""

import math
from itertools import pairwise

import pytest
import torch

from rlpost.objectives.distillation import divergence_to_go, fold, top_tokens, with_others
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.supervised import forward_kl, jensen_shannon, reverse_kl


def log(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


STUDENT, TEACHER = log([0.5, 0.2, 0.2, 0.1]), log([0.1, 0.6, 0.05, 0.25])


def test_the_teachers_likeliest_tokens_come_first():
    ids, logp = top_tokens(TEACHER, 2)
    assert ids.tolist() == [[1, 3]]
    assert logp.exp().tolist() == [pytest.approx([0.6, 0.25])]


def test_all_others_are_one_class():
    ids, _ = top_tokens(TEACHER, 2)
    assert fold(STUDENT, ids).exp().tolist() == [pytest.approx([0.2, 0.1, 0.7])]
    assert fold(TEACHER, ids).exp().tolist() == [pytest.approx([0.6, 0.25, 0.15])]


def test_the_folded_divergence_by_hand():
    ids, _ = top_tokens(TEACHER, 2)
    student, teacher = fold(STUDENT, ids), fold(TEACHER, ids)
    by_hand = 0.6 * math.log(0.6 / 0.2) + 0.25 * math.log(0.25 / 0.1) + 0.15 * math.log(0.15 / 0.7)
    assert forward_kl(student, teacher).tolist() == pytest.approx([by_hand])


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon])
def test_it_is_zero_for_equals_and_grows_with_k_up_to_the_whole(divergence):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 20, 9, dtype=torch.float64, generator=generator).log_softmax(-1)
    found = []
    for k in range(1, 9):
        ids, _ = top_tokens(teacher, k)
        assert divergence(fold(teacher, ids), fold(teacher, ids)).abs().max() < 1e-15
        found.append(divergence(fold(student, ids), fold(teacher, ids)))
    assert all((later - earlier).min() > -1e-15 for earlier, later in pairwise(found))
    assert torch.allclose(found[-1], divergence(student, teacher), rtol=0, atol=1e-14)
    assert (found[0] < found[-1]).any()


def test_the_gradient_reaches_every_token():
    logits = STUDENT.clone().requires_grad_()
    ids, _ = top_tokens(TEACHER, 1)
    forward_kl(fold(logits.log_softmax(-1), ids), fold(TEACHER, ids)).sum().backward()
    # ∇ of −Σ q log p over two classes: p − q, the others' part shared by their probabilities.
    others = 0.8 - 0.4
    assert logits.grad[0].tolist() == pytest.approx(
        [others * 0.5 / 0.8, 0.2 - 0.6, others * 0.2 / 0.8, others * 0.1 / 0.8]
    )


def test_nothing_left_for_the_others_has_a_gradient_still():
    """In float32 the others' share is below its rounding, yet known: it is summed, not what is left of 1."""
    logits = torch.tensor([[0.0, -40.0, -41.0]], requires_grad=True)
    ids = torch.tensor([[0]])
    folded = fold(logits.log_softmax(-1), ids)
    assert folded[0, 1].item() == pytest.approx(-40 + math.log(1 + math.exp(-1)), rel=1e-6)
    reverse_kl(folded, with_others(torch.tensor([[math.log(0.9)]]))).sum().backward()
    assert logits.grad.isfinite().all()
    never = torch.tensor([[0.0, -torch.inf, -torch.inf]], requires_grad=True)
    reverse_kl(fold(never, ids), with_others(torch.tensor([[0.0]]))).sum().backward()
    assert never.grad.isfinite().all()


def test_what_is_known_of_some_tokens_leaves_the_rest():
    assert with_others(log([0.6, 0.25])).exp().tolist() == [pytest.approx([0.6, 0.25, 0.15])]
    certain = with_others(torch.tensor([[0.0, -30.0]]))
    assert certain.isfinite().all()
    assert certain[0, 2].exp().item() == pytest.approx(torch.finfo(torch.float32).eps)
    assert with_others(torch.tensor([[1e-6]])).isfinite().all()


@pytest.mark.parametrize("k", [0, -1, 4, 9])
def test_a_k_that_leaves_nothing_is_refused(k):
    with pytest.raises(ValueError, match="from 1 to 3"):
        top_tokens(TEACHER, k)


def test_folding_over_all_tokens_is_refused():
    with pytest.raises(ValueError, match="leave no others"):
        fold(STUDENT, torch.arange(4)[None])


def test_half_precision_is_widened():
    folded = fold(STUDENT.bfloat16(), torch.tensor([[0]]))
    assert folded.dtype == torch.float32
    assert with_others(STUDENT[:, :2].bfloat16()).dtype == torch.float32


def test_what_is_to_come_less_the_others_mean():
    """Two groups of three: lengths 3, 1, 2 and 0, 2, 1."""
    rows = Ragged([3, 1, 2, 0, 2, 1])
    found = divergence_to_go(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]), rows, 3)
    later = {0: [5, 3, 0], 1: [0], 2: [6, 0], 4: [8, 0], 5: [0]}
    by_hand = [
        *(5 - (0 + 6) / 2, 3 - (0 + 0) / 2, 0 - 0),
        0 - (5 + 6) / 2,
        *(6 - (5 + 0) / 2, 0 - (3 + 0) / 2),
        *(8 - 0, 0 - 0),
        0 - 8,
    ]
    assert found.tolist() == by_hand
    alone = divergence_to_go(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]), rows, 1)
    assert alone.tolist() == [float(x) for row in later.values() for x in row]


def test_it_is_a_number_without_gradient():
    x = torch.ones(3, requires_grad=True)
    assert not divergence_to_go(x, Ragged([1, 2]), 2).requires_grad


@pytest.mark.parametrize("size", [0, 2, 4])
def test_rows_that_are_no_whole_groups(size):
    with pytest.raises(ValueError, match="3 completions are not groups"):
        divergence_to_go(torch.ones(3), Ragged([1, 1, 1]), size)
