"""Advantages by hand, the zero-signal rule, and what is left out of learning."""

import math

import pytest
import torch

from rlpost.objectives import Rows, group_mean, group_normalised, leave_one_out, return_to_go
from rlpost.objectives.rows import has_signal

NAN = math.nan
ALL = [group_mean, group_normalised, leave_one_out]


def test_group_mean_by_hand():
    assert group_mean(torch.tensor([[0.0, 0.0, 0.0, 1.0]])).tolist() == [[-0.25, -0.25, -0.25, 0.75]]


def test_group_normalised_uses_bessels_correction():
    found = group_normalised(torch.tensor([[0.0, 2.0], [1.0, 4.0]], dtype=torch.float64), eps=0.5)
    low, high = math.sqrt(2), math.sqrt(4.5)
    expected = [-1 / (low + 0.5), 1 / (low + 0.5), -1.5 / (high + 0.5), 1.5 / (high + 0.5)]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("group_size", [2, 3, 4, 7])
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(group_size):
    torch.manual_seed(0)
    reward = torch.randn(3, group_size, dtype=torch.float64)
    expected = [[r - (sum(row) - r) / (group_size - 1) for r in row] for row in reward.tolist()]
    assert torch.allclose(leave_one_out(reward), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("advantage", ALL)
def test_equal_rewards_carry_no_signal_whatever_rounding_says(advantage):
    reward = torch.full((1, 8), 0.95)
    assert torch.equal(advantage(reward), torch.zeros(1, 8))


def test_without_the_rule_equal_rewards_would_be_full_size():
    # 0.1 seven times: the float32 mean is off by a digit, and a tiny eps blows that digit up.
    reward = torch.full((1, 7), 0.1)
    centred = reward - reward.sum() / 7
    naive = centred / (centred.square().sum() / 6).sqrt().add(1e-9)
    assert naive.abs().max() > 0.5
    assert group_normalised(reward, eps=1e-9).abs().max() == 0.0


@pytest.mark.parametrize("advantage", ALL)
def test_a_group_of_one_has_no_baseline(advantage):
    assert advantage(torch.tensor([[3.0], [-1.0]])).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("advantage", ALL)
def test_unscored_completions_are_absent_from_every_statistic(advantage):
    with_gap = advantage(torch.tensor([[1.0, NAN, 2.0, 6.0], [NAN, NAN, NAN, NAN], [NAN, 5.0, NAN, NAN]]))
    without = advantage(torch.tensor([[1.0, 2.0, 6.0]]))
    assert with_gap[0, [0, 2, 3]].tolist() == without[0].tolist()
    assert with_gap[0, 1] == 0.0
    assert with_gap[1:].tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("advantage", ALL)
def test_groups_do_not_see_one_another_and_order_is_kept(advantage):
    reward = torch.tensor([[1.0, 4.0, 2.0], [9.0, -3.0, 0.5]], dtype=torch.float64)
    both = advantage(reward)
    assert torch.equal(both[1], advantage(reward[1:])[0])
    assert torch.allclose(advantage(reward.flip(1)), both.flip(1), rtol=0, atol=1e-15)
    assert both.sum(1).abs().max() < 1e-14


@pytest.mark.parametrize("advantage", ALL)
def test_a_constant_added_to_every_reward_changes_nothing(advantage):
    reward = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
    assert torch.allclose(advantage(reward + 5), advantage(reward), rtol=0, atol=1e-14)


@pytest.mark.parametrize("advantage", ALL)
def test_number_formats(advantage):
    reward = torch.tensor([[0.0, 1.0, 1.0, 5.0]])
    assert advantage(reward.double()).dtype == torch.float64
    for narrow in (torch.bfloat16, torch.float16, torch.int64):
        assert torch.equal(advantage(reward.to(narrow)), advantage(reward))
    exact = advantage(reward.double())
    assert (advantage(reward) - exact).abs().max() < 1e-6


def test_signal_needs_two_scored_rewards_that_differ():
    reward = torch.tensor([[0.0, 1.0], [1.0, 1.0], [NAN, 1.0], [NAN, NAN]])
    assert has_signal(reward).tolist() == [True, False, False, False]


def test_return_to_go_by_hand():
    rows = Rows([3, 0, 2])
    reward = torch.tensor([1.0, 0.0, 4.0, 0.0, 8.0])
    assert return_to_go(reward, rows).tolist() == [5.0, 4.0, 4.0, 8.0, 8.0]
    assert return_to_go(reward, rows, gamma=0.5).tolist() == [2.0, 2.0, 4.0, 4.0, 8.0]
    assert return_to_go(reward, rows, gamma=0.0).tolist() == reward.tolist()


def test_return_to_go_without_actions_and_its_formats():
    assert return_to_go(torch.zeros(0), Rows([0, 0]), gamma=0.9).shape == (0,)
    assert return_to_go(torch.zeros(0), Rows([]), gamma=0.9).shape == (0,)
    for gamma in (1.0, 0.5):
        assert return_to_go(torch.ones(2).double(), Rows([2]), gamma).dtype == torch.float64
        assert return_to_go(torch.ones(2).bfloat16(), Rows([2]), gamma).dtype == torch.float32
