"""Rows: which action belongs to which completion."""

import pytest
import torch

from rlpost.objectives import Ragged
from rlpost.objectives.ragged import has_signal, widen

X = torch.tensor([1.0, 2.0, 10.0, 20.0, 30.0])


@pytest.fixture
def rows() -> Ragged:
    return Ragged([2, 0, 3])


def test_sums_and_means_by_hand(rows):
    assert rows.sum(X).tolist() == [3.0, 0.0, 60.0]
    assert rows.mean(X).tolist() == [1.5, 0.0, 20.0]
    assert (rows.actions, rows.completions, rows.learned) == (5, 3, 2)


def test_spread_and_last(rows):
    assert rows.spread(torch.tensor([7.0, 8.0, 9.0])).tolist() == [7.0, 7.0, 9.0, 9.0, 9.0]
    assert rows.last.tolist() == [1, -1, 4]


def test_pad_and_flatten_are_inverse(rows):
    padded = rows.pad(X, fill=-1.0)
    assert padded.tolist() == [[1.0, 2.0, -1.0], [-1.0, -1.0, -1.0], [10.0, 20.0, 30.0]]
    assert torch.equal(rows.flatten(padded), X)


def test_suffix_sum_stays_within_a_completion(rows):
    assert rows.suffix_sum(X).tolist() == [3.0, 2.0, 60.0, 50.0, 30.0]


def test_suffix_sum_keeps_small_completions_beside_huge_ones():
    rows = Ragged([1, 2])
    found = rows.suffix_sum(torch.tensor([1e12, 1e-3, 2e-3], dtype=torch.float32))
    assert found[1:].tolist() == pytest.approx([3e-3, 2e-3], rel=1e-6)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_at_all_survives(lengths):
    rows, x = Ragged(lengths), torch.zeros(0, requires_grad=True)
    s = len(lengths)
    assert rows.sum(x).tolist() == rows.mean(x).tolist() == [0.0] * s
    assert rows.last.tolist() == [-1] * s
    assert rows.suffix_sum(x).shape == rows.flatten(rows.pad(x)).shape == rows.spread(torch.zeros(s)).shape == (0,)
    rows.mean(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0,)


def test_gradient_of_a_mean_by_hand(rows):
    x = X.clone().requires_grad_()
    (rows.mean(x) * torch.tensor([1.0, 5.0, 6.0])).sum().backward()
    assert x.grad.tolist() == [0.5, 0.5, 2.0, 2.0, 2.0]


def test_sums_are_taken_in_at_least_float32(rows):
    many = Ragged([1000])
    assert many.sum(torch.ones(1000, dtype=torch.bfloat16)).item() == 1000.0  # bfloat16 alone stops at 256
    assert rows.sum(X.double()).dtype == rows.suffix_sum(X.double()).dtype == torch.float64
    assert rows.mean(X.to(torch.int64)).tolist() == [1.5, 0.0, 20.0]
    assert widen(X.half()).dtype == torch.float32
    assert widen(X.double()).dtype == torch.float64


def test_lengths_may_be_a_tensor():
    assert Ragged(torch.tensor([1, 2])).index_N.tolist() == [0, 1, 1]


def test_a_group_has_a_signal_where_two_scored_rewards_differ():
    nan = float("nan")
    groups = torch.tensor(
        [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [nan, 1.0, 1.0], [nan, 1.0, 2.0], [nan, nan, 1.0], [nan] * 3]
    )
    assert has_signal(groups).tolist() == [False, True, False, True, False, False]
