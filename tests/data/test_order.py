import json
from collections import Counter

import pytest

from rlpost.data.order import Order
from rlpost.errors import DataError


def draws(order, n):
    return [order.next() for _ in range(n)]


def test_every_epoch_is_a_new_permutation_of_all_rows():
    order = Order([7], [1.0], seed=3)
    assert order.epoch_length == 7
    epochs = [[d.row for d in draws(order, 7)] for _ in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(7))] * 3
    assert len({tuple(e) for e in epochs}) == 3


def test_draws_carry_their_epoch_and_a_seed_of_their_own():
    drawn = draws(Order([4], [1.0], seed=0), 12)
    assert [d.epoch for d in drawn] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({d.seed for d in drawn}) == 12
    assert max(d.seed for d in drawn) < 2**53


def test_sources_alternate_by_weight_whatever_their_size():
    drawn = draws(Order([3, 1000], [3.0, 1.0], seed=0), 4000)
    assert Counter(d.source for d in drawn) == {0: 3000, 1: 1000}
    for t in range(1, 4001, 97):  # at any time, within one of the share
        assert abs(sum(d.source == 0 for d in drawn[:t]) - 0.75 * t) <= 1
    assert [d.source for d in drawn[:4]] == [
        0,
        0,
        1,
        0,
    ]  # behind by (.75, .25), (.5, .5): first wins, (.25, .75), (1, 0)


def test_weight_zero_is_never_drawn():
    assert {d.source for d in draws(Order([2, 2, 2], [0.0, 1.0, 1.0], seed=0), 50)} == {1, 2}


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 6, 9, 10, 11, 29])
def test_resume_is_exact_wherever_it_falls(cut):
    whole = draws(Order([5, 3], [2.0, 1.0], seed=1), 40)
    first = Order([5, 3], [2.0, 1.0], seed=1)
    draws(first, cut)
    state = json.loads(json.dumps(first.state()))
    second = Order([5, 3], [2.0, 1.0], seed=1)
    second.load(state)
    assert draws(second, 40 - cut) == whole[cut:]


def test_the_order_depends_on_the_seed_alone():
    assert draws(Order([50], [1.0], seed=1), 50) == draws(Order([50], [1.0], seed=1), 50)
    assert draws(Order([50], [1.0], seed=1), 50) != draws(Order([50], [1.0], seed=2), 50)


def test_refusals():
    with pytest.raises(DataError, match="no rows"):
        Order([3, 0], [1.0, 1.0], seed=0)
    with pytest.raises(DataError, match="weights"):
        Order([3], [0.0], seed=0)
    with pytest.raises(DataError, match=r"\[3\] rows when this run began and has \[4\] now"):
        Order([4], [1.0], seed=0).load(Order([3], [1.0], seed=0).state())
