"""Weighted sums of losses of pairs."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from rlpost.facts import fact
from rlpost.objectives import PairBatch, WeightedSum, alphapo, bco, cpo, dpo, simpo


def batch() -> PairBatch:
    return PairBatch(
        torch.tensor([[-2.0, -8.0], [-1.0, -3.0]], dtype=torch.float64),
        torch.tensor([[-3.0, -5.0], [-2.0, -2.0]], dtype=torch.float64),
        torch.tensor([[2.0, 4.0], [1.0, 3.0]], dtype=torch.float64),
    )


def test_a_sum_by_hand_and_each_loss_by_name():
    pairs = batch()
    mixed = WeightedSum(
        {"dpo": partial(dpo, beta=0.5), "bco": bco, "simpo": simpo}, {"dpo": 0.8, "bco": 0.2, "simpo": 0}
    )
    each = mixed.each(pairs)
    assert list(each) == ["dpo", "bco", "simpo"]
    assert torch.equal(each["simpo"], simpo(pairs))
    assert torch.allclose(mixed(pairs), 0.8 * dpo(pairs, beta=0.5) + 0.2 * bco(pairs), rtol=1e-15, atol=0)
    assert mixed.total({"dpo": 10.0, "bco": 100.0, "simpo": 1.0}) == 28.0


def test_one_loss_of_weight_1_is_itself_to_the_last_bit():
    assert torch.equal(WeightedSum({"dpo": dpo}, {"dpo": 1.0})(batch()), dpo(batch()))


def test_what_one_loss_needs_the_sum_needs():
    def of(*losses):
        return WeightedSum({f.__name__: f for f in losses}, {f.__name__: 1.0 for f in losses})

    assert fact(of(dpo, bco), "couples_pairs")
    assert not fact(of(dpo, simpo), "couples_pairs")
    assert fact(of(dpo, simpo), "needs_reference")
    assert not fact(of(alphapo, cpo), "needs_reference")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"dpo": 0.0}, "all weights are 0"),
        ({"dpo": -1.0}, "the weight of dpo is a finite number, 0 or more, got -1.0"),
        ({"dpo": math.nan}, "the weight of dpo is a finite number"),
        ({"ipo": 1.0}, "give one weight a loss"),
        ({}, "give one weight a loss"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum({"dpo": dpo}, weights)
