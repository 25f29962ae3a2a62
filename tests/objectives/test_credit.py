"""Credit per action by hand, and the identities among its forms."""

import pytest
import torch

from rlpost.objectives.credit import (
    Steps,
    gae,
    least,
    monte_carlo_values,
    on_last,
    potential_shaping,
    process,
    process_normalised,
    return_to_go,
    reward_on_last_action,
    spread_evenly,
)
from rlpost.objectives.ragged import Ragged

NAN = float("nan")


def numbers(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


@pytest.fixture
def steps() -> Steps:
    """Completions of 3, 0 and 2 actions; the first has steps of 2 and 1 actions, the last one step of 2."""
    return Steps(Ragged([3, 0, 2]), torch.tensor([False, True, False, False, False]))


def test_steps_end_where_told_and_where_completions_do(steps):
    assert steps.last_K.tolist() == [1, 2, 4]
    assert steps.rows_K.lengths_S.tolist() == [2, 1, 2]
    assert steps.completion_K.tolist() == [0, 0, 2]
    assert steps.count_S.tolist() == [2, 0, 1]
    assert steps.step_N.tolist() == [0, 0, 1, 2, 2]
    assert steps.spread(numbers(7, 8, 9)).tolist() == [7, 7, 8, 9, 9]


def test_steps_leave_what_they_were_told_as_it_was():
    ends_N = torch.tensor([False, False])
    assert Steps(Ragged([2]), ends_N).last_K.tolist() == [1]
    assert ends_N.tolist() == [False, False]


def test_a_reward_sits_on_the_last_action():
    assert reward_on_last_action(numbers(5, 6, 7), Ragged([3, 0, 2])).tolist() == [0, 0, 5, 0, 7]


def test_return_to_go_by_hand():
    rows = Ragged([3, 0, 2])
    reward = numbers(1, 0, 4, 0, 8)
    assert return_to_go(reward, rows).tolist() == [5, 4, 4, 8, 8]
    assert return_to_go(reward, rows, gamma=0.5).tolist() == [2, 2, 4, 4, 8]
    assert return_to_go(reward, rows, gamma=0.0).tolist() == reward.tolist()


def test_gae_by_hand():
    # δ = (0 + ½·2 − 4, 8 − 2) = (−3, 6); A = (−3 + ¼·6, 6).
    advantage, returns = gae(numbers(0, 8), numbers(4, 2), Ragged([2]), gamma=0.5, gae_lambda=0.5)
    assert advantage.tolist() == [-1.5, 6.0]
    assert returns.tolist() == [2.5, 8.0]


def test_gae_stays_within_a_completion():
    reward, value = numbers(0, 8, 1, 0, 2), numbers(4, 2, 3, 7, 5)
    together = gae(reward, value, Ragged([2, 0, 3]), gamma=0.5, gae_lambda=0.5)[0]
    first = gae(reward[:2], value[:2], Ragged([2]), gamma=0.5, gae_lambda=0.5)[0]
    last = gae(reward[2:], value[2:], Ragged([3]), gamma=0.5, gae_lambda=0.5)[0]
    assert together.tolist() == [*first.tolist(), *last.tolist()]


def test_gae_at_lambda_zero_is_the_temporal_difference():
    advantage, _ = gae(numbers(1, 2, 3), numbers(10, 20, 30), Ragged([3]), gamma=0.5, gae_lambda=0.0)
    assert advantage.tolist() == [1 + 10 - 10, 2 + 15 - 20, 3 - 30]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_at_lambda_one_forgives_every_value(gamma):
    """A + V is the return-to-go, whatever the critic says."""
    torch.manual_seed(0)
    rows, reward = Ragged([4, 0, 1, 5]), torch.randn(10, dtype=torch.float64)
    _, returns = gae(reward, torch.randn(10, dtype=torch.float64), rows, gamma=gamma, gae_lambda=1.0)
    assert torch.allclose(returns, return_to_go(reward, rows, gamma=gamma), rtol=0, atol=1e-14)


def test_a_bootstrap_counts_as_the_value_after_the_cut():
    reward, value, rows = numbers(0, 0, 1), numbers(3, 4, 5), Ragged([2, 0, 1])
    bootstrap = numbers(8, 100, 0)  # cut, without actions, terminated
    advantage, returns = gae(reward, value, rows, gamma=0.5, gae_lambda=1.0, bootstrap_S=bootstrap)
    assert returns.tolist() == [2.0, 4.0, 1.0]  # ¼·8, ½·8, and the reward alone
    assert advantage.tolist() == [-1.0, 0.0, -4.0]
    ended = gae(reward, value, rows, gamma=0.5, gae_lambda=1.0)
    zeros = gae(reward, value, rows, gamma=0.5, gae_lambda=1.0, bootstrap_S=torch.zeros(3))
    assert ended[0].tolist() == zeros[0].tolist() == [-3.0, -4.0, -4.0]


def test_a_true_value_leaves_no_advantage_to_a_sure_reward():
    rows, reward = Ragged([4]), numbers(0, 0, 0, 8)
    value = return_to_go(reward, rows, gamma=0.5)
    for lam in (0.0, 0.5, 0.95, 1.0):
        assert gae(reward, value, rows, gamma=0.5, gae_lambda=lam)[0].tolist() == [0.0] * 4


def test_the_forms_of_a_steps_reward_by_hand(steps):
    reward = numbers(6, 1, -4)
    assert spread_evenly(reward, steps).tolist() == [3, 3, 1, -2, -2]
    assert on_last(reward, steps).tolist() == [0, 6, 1, 0, -4]
    assert least(reward, steps).tolist() == [0, 0, 1, 0, -4]


def test_the_worst_step_is_the_first_of_equals():
    three = Steps(Ragged([3, 2]), torch.ones(5, dtype=torch.bool))
    assert least(numbers(5, 2, 2, -1, -1), three).tolist() == [0, 2, 0, -1, 0]


def test_process_by_hand(steps):
    reward = numbers(6, 1, -4)
    assert process(reward, steps).tolist() == [7, 4, 1, -4, -2]
    assert process(reward, steps, how="last").tolist() == [7, 7, 1, -4, -4]
    assert process(reward, steps, how="least").tolist() == [1, 1, 1, -4, -4]
    assert process(reward, steps, how="last", gamma=0.5).tolist() == [3.25, 6.5, 1, -2, -4]


def test_a_total_return_does_not_depend_on_how_it_is_spread():
    torch.manual_seed(1)
    rows = Ragged([5, 0, 3, 1])
    steps = Steps(rows, torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 1]).bool())
    reward = torch.randn(5, dtype=torch.float64)
    first = rows.start_S[rows.lengths_S > 0]
    even, last, least_ = (process(reward, steps, how=how)[first] for how in ("even", "last", "least"))
    assert torch.allclose(even, last, rtol=0, atol=1e-14)
    assert not torch.allclose(even, least_, rtol=0, atol=1e-3)


def test_process_refuses_another_form(steps):
    with pytest.raises(ValueError, match="even, last, least"):
        process(numbers(1, 2, 3), steps, how="middle")


def test_process_normalised_by_hand():
    # Rewards 1, 3 and 2 of one group: mean 2, standard deviation 1. Of the other group: equal.
    steps = Steps(Ragged([3, 1, 0, 2]), torch.tensor([0, 1, 1, 1, 0, 1]).bool())
    found = process_normalised(numbers(1, 3, 2, 0.95), steps, 2, eps=0.0)
    assert found.tolist() == [0, 0, 1, 0, 0, 0]


def test_a_step_without_a_reward_is_absent_from_the_statistics():
    with_gap = Steps(Ragged([3, 1]), torch.ones(4, dtype=torch.bool))
    found = process_normalised(numbers(1, NAN, 5, 3), with_gap, 2, eps=0.0)
    assert found.tolist() == [0, 1, 1, 0]  # z = −1, none, 1 and 0
    assert process_normalised(numbers(NAN, NAN, 5, NAN), with_gap, 2).tolist() == [0] * 4


def test_steps_rewarded_alike_carry_no_signal_whatever_rounding_says():
    steps = Steps(Ragged([7]), torch.ones(7, dtype=torch.bool))
    assert process_normalised(torch.full((7,), 0.1), steps, 1, eps=1e-9).tolist() == [0.0] * 7


def test_process_normalised_refuses_what_are_no_whole_groups(steps):
    with pytest.raises(ValueError, match="groups of 2"):
        process_normalised(numbers(1, 2, 3), steps, 2)


def test_monte_carlo_values_by_hand(steps):
    # The first completion is worth .2, then .7, and ends with 1; the last is worth .4 and ends with 0.
    found = monte_carlo_values(numbers(0.2, 0.7, 0.4), numbers(1, 5, 0), steps)
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.3, -0.4, -0.4], abs=1e-15)


def test_monte_carlo_values_add_up_to_the_reward_less_the_prompts_value():
    torch.manual_seed(2)
    rows = Ragged([3, 4, 2])
    steps = Steps(rows, torch.ones(9, dtype=torch.bool))
    value, reward = torch.rand(9, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    expected = reward - value[rows.start_S]
    assert torch.allclose(rows.sum(monte_carlo_values(value, reward, steps)), expected, rtol=0, atol=1e-15)


def test_shaping_by_hand():
    potential, rows = numbers(1, 4, 2, 5, 3), Ragged([3, 0, 2])
    assert potential_shaping(potential, rows).tolist() == [3, -2, -2, -2, -3]
    assert potential_shaping(potential, rows, gamma=0.5).tolist() == [1, -3, -2, -3.5, -3]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_pays_minus_the_prompts_potential_whatever_is_done(gamma):
    torch.manual_seed(3)
    rows, potential = Ragged([4, 1, 0, 6]), torch.randn(11, dtype=torch.float64)
    paid = return_to_go(potential_shaping(potential, rows, gamma=gamma), rows, gamma=gamma)
    # Telescopes from every action on, so that a baseline that knows the state takes all of it away.
    assert torch.allclose(paid, -potential, rtol=0, atol=1e-14)


def test_nothing_to_divide_into_steps():
    none = Steps(Ragged([0, 0]), torch.zeros(0, dtype=torch.bool))
    assert (none.count_S.tolist(), none.last_K.tolist(), none.step_N.tolist()) == ([0, 0], [], [])
