"""The learning rate, update by update."""

import pytest

from rlpost.train.params import Schedule
from rlpost.train.schedules import learning_rate_factor


def factors(schedule: Schedule, warmup: float, updates: int) -> list[float]:
    factor = learning_rate_factor(schedule, warmup, updates)
    return [factor(update) for update in range(updates)]


def test_constant():
    assert factors(Schedule.constant, 0, 4) == [1, 1, 1, 1]


def test_linear_goes_down_towards_zero_which_no_update_has():
    assert factors(Schedule.linear, 0, 4) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_cosine():
    assert factors(Schedule.cosine, 0, 4) == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])


def test_warmup_as_a_number_of_updates_or_as_a_share_of_all():
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(Schedule.linear, 4, 8) == pytest.approx(expected)
    assert factors(Schedule.linear, 0.5, 8) == pytest.approx(expected)


def test_the_peak_is_reached_once_the_warmup_is_over_and_the_shape_begins_there():
    assert factors(Schedule.cosine, 2, 4) == pytest.approx([0.5, 1, 1, 0.5])


def test_a_warmup_of_one_counts_one_update():
    assert factors(Schedule.constant, 1, 3) == [1, 1, 1]
    assert factors(Schedule.constant, 2, 3) == [0.5, 1, 1]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_warmup_longer_than_the_training_only_rises(schedule):
    assert factors(schedule, 10, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup", [0, 0.1, 3])
@pytest.mark.parametrize("updates", [1, 2, 7, 100])
def test_every_update_has_a_rate_above_zero_and_none_above_the_peak(schedule, warmup, updates):
    assert all(0 < f <= 1 for f in factors(schedule, warmup, updates))
