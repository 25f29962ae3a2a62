"""Advantages by hand, the zero-signal rule, and what is left out of learning."""

import math
from functools import partial
from itertools import combinations

import pytest
import torch

from rlpost.objectives.advantages import (
    ema,
    ema_baseline,
    greedy_baseline,
    group_mean,
    group_normalised,
    leave_one_out,
    length_weighted_baseline,
    max_likelihood,
    nonzero_rescaled,
    pass_at_k,
    per_reward_normalised,
    reward,
    soft_leave_one_out,
    whiten,
)
from rlpost.objectives.ragged import has_signal

NAN = math.nan


def batch_normalised(reward_PG):
    return group_normalised(reward_PG, std_over="batch")


def equal_lengths(reward_PG):
    return length_weighted_baseline(reward_PG, torch.full(reward_PG.shape, 3))


def two_rewards(reward_PG):
    """The reward and its square, the second for half."""
    return per_reward_normalised(torch.stack([reward_PG, reward_PG**2], 2), torch.tensor([1.0, 0.5]))


soft = partial(soft_leave_one_out, beta=0.5)
CENTRED = [group_mean, group_normalised, leave_one_out, equal_lengths]
"""Of one group alone, and blind to a constant."""
ALL = [*CENTRED, soft, batch_normalised, max_likelihood, nonzero_rescaled, two_rewards]


def test_group_mean_by_hand():
    assert group_mean(torch.tensor([[0.0, 0.0, 0.0, 1.0]])).tolist() == [[-0.25, -0.25, -0.25, 0.75]]


def test_group_normalised_uses_bessels_correction():
    found = group_normalised(torch.tensor([[0.0, 2.0], [1.0, 4.0]], dtype=torch.float64), eps=0.5)
    low, high = math.sqrt(2), math.sqrt(4.5)
    expected = [-1 / (low + 0.5), 1 / (low + 0.5), -1.5 / (high + 0.5), 1.5 / (high + 0.5)]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-15)


def test_soft_leave_one_out_by_hand():
    found = soft_leave_one_out(torch.tensor([[0.0, 1.0, 3.0], [2.0, NAN, 1.0]], dtype=torch.float64), beta=2.0)
    low, middle, high = (2 * math.log((math.exp(a / 2) + math.exp(b / 2)) / 2) for a, b in ((1, 3), (0, 3), (0, 1)))
    assert found.flatten().tolist() == pytest.approx([0 - low, 1 - middle, 3 - high, 1.0, 0.0, -1.0], abs=1e-14)


def test_a_soft_value_lies_between_the_mean_and_the_best():
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.2]], dtype=torch.float64)
    assert torch.allclose(soft_leave_one_out(rewards, beta=1e6), leave_one_out(rewards), rtol=0, atol=1e-6)
    best = torch.tensor([[-1.0, 0.5, -0.5, -0.8]], dtype=torch.float64)
    assert torch.allclose(soft_leave_one_out(rewards, beta=1e-5), best, rtol=0, atol=2e-5)
    assert soft_leave_one_out(1e4 * rewards.float(), beta=1e-2).isfinite().all()
    with pytest.raises(ValueError, match="beta=0"):
        soft_leave_one_out(rewards, beta=0.0)


@pytest.mark.parametrize("group_size", [2, 3, 4, 7])
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(group_size):
    torch.manual_seed(0)
    reward = torch.randn(3, group_size, dtype=torch.float64)
    expected = [[r - (sum(row) - r) / (group_size - 1) for r in row] for row in reward.tolist()]
    assert torch.allclose(leave_one_out(reward), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("advantage", [*ALL, partial(pass_at_k, k=3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_carry_no_signal_whatever_rounding_says(advantage, dtype):
    reward = torch.full((1, 8), 0.95, dtype=dtype)
    assert torch.equal(advantage(reward), torch.zeros(1, 8, dtype=dtype))


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
    with_gap = advantage(torch.tensor([[1.0, NAN, 2.0, 6.0], [NAN, NAN, NAN, NAN]]))
    without = advantage(torch.tensor([[1.0, 2.0, 6.0]]))
    assert with_gap[0, [0, 2, 3]].tolist() == pytest.approx(without[0].tolist())
    assert with_gap[0, 1] == 0.0
    assert with_gap[1].tolist() == [0.0] * 4
    assert advantage(torch.tensor([[NAN, 5.0, NAN, NAN]])).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("advantage", CENTRED)
def test_groups_do_not_see_one_another_and_order_is_kept(advantage):
    reward = torch.tensor([[1.0, 4.0, 2.0], [9.0, -3.0, 0.5]], dtype=torch.float64)
    both = advantage(reward)
    assert torch.equal(both[1], advantage(reward[1:])[0])
    assert torch.allclose(advantage(reward.flip(1)), both.flip(1), rtol=0, atol=1e-15)
    assert both.sum(1).abs().max() < 1e-14


@pytest.mark.parametrize("advantage", CENTRED)
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


def test_the_reward_itself():
    assert reward(torch.tensor([[3, -1]])).tolist() == [[3.0, -1.0]]
    assert reward(torch.tensor([[NAN, 2.0]])).tolist() == [[0.0, 2.0]]


def test_a_batchs_standard_deviation_is_of_all_rewards_of_the_step():
    # 0, 2, 1, 4 and 4: mean 2.2, squares of differences 4.84 + 0.04 + 1.44 + 3.24 + 3.24 = 12.8.
    found = batch_normalised(torch.tensor([[0.0, 2.0], [1.0, 4.0], [NAN, 4.0]], dtype=torch.float64))
    std = math.sqrt(12.8 / 4) + 1e-4
    assert found.flatten().tolist() == pytest.approx([-1 / std, 1 / std, -1.5 / std, 1.5 / std, 0.0, 0.0], abs=1e-15)


def test_a_standard_deviation_is_over_group_or_batch():
    with pytest.raises(ValueError, match="`group` or the `batch`"):
        group_normalised(torch.zeros(1, 2), std_over="step")


def test_greedy_baseline_by_hand():
    found = greedy_baseline(torch.tensor([[1.0, 4.0], [2.0, 2.0]]), torch.tensor([3.0, 0.5]))
    assert found.tolist() == [[-2.0, 1.0], [1.5, 1.5]]  # a group of equal rewards learns too
    assert greedy_baseline(torch.tensor([[5.0]]), torch.tensor([3.0])).tolist() == [[2.0]]  # and a group of one


def test_greedy_baseline_without_a_reward_or_a_baseline():
    found = greedy_baseline(torch.tensor([[1.0, NAN], [2.0, 3.0]]), torch.tensor([3.0, NAN]))
    assert found.tolist() == [[-2.0, 0.0], [0.0, 0.0]]


def test_length_weighted_baseline_by_hand():
    # (2·1 + 6·5)/8 = 4; the unscored one's length does not count either.
    found = length_weighted_baseline(torch.tensor([[1.0, 5.0, NAN]]), torch.tensor([[2, 6, 100]]))
    assert found.tolist() == [[-3.0, 1.0, 0.0]]
    assert equal_lengths(torch.tensor([[0.0, 3.0, 6.0]])).tolist() == [[-3.0, 0.0, 3.0]]
    # Completions without actions have no length to weigh by, and nothing that learns.
    assert length_weighted_baseline(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)).isfinite().all()


def test_its_advantages_weighed_by_length_cancel():
    torch.manual_seed(0)
    reward_PG, length_PG = torch.randn(3, 5, dtype=torch.float64), torch.randint(1, 9, (3, 5))
    assert (length_weighted_baseline(reward_PG, length_PG) * length_PG).sum(1).abs().max() < 1e-13


def test_max_likelihood_by_hand():
    assert max_likelihood(torch.tensor([[0.0, 0.0, 0.0, 1.0]])).tolist() == [[-1.0, -1.0, -1.0, 3.0]]
    assert max_likelihood(torch.tensor([[1.0, 3.0, NAN]])).tolist() == [[-0.5, 0.5, 0.0]]
    assert max_likelihood(torch.tensor([[-2.0, 2.0], [-3.0, 1.0]])).tolist() == [[0.0, 0.0]] * 2  # mean 0 and −1


def best_of_sets(rewards: list[float], k: int) -> list[float]:
    """k·(mean of the best over k-sets with i − over those without it), by enumeration."""
    found = []
    for i in range(len(rewards)):
        others = [j for j in range(len(rewards)) if j != i]
        with_i = [max(rewards[i], *(rewards[j] for j in rest)) for rest in combinations(others, k - 1) if rest]
        with_i = with_i or [rewards[i]]
        without_i = [max(rewards[j] for j in rest) for rest in combinations(others, min(k, len(others)))]
        found.append(k * (sum(with_i) / len(with_i) - sum(without_i) / len(without_i)))
    return found


@pytest.mark.parametrize(("size", "k"), [(2, 1), (2, 2), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5), (7, 3)])
def test_pass_at_k_agrees_with_an_enumeration_of_sets(size, k):
    torch.manual_seed(size + k)
    several = torch.randn(3, size, dtype=torch.float64).round(decimals=1)
    several[1] = (several[1] > 0).double()
    several[1, 0] = 1 - several[1, 1]
    expected = torch.tensor([best_of_sets(row, k) for row in several.tolist()], dtype=torch.float64)
    assert torch.allclose(pass_at_k(several, k=k), expected, rtol=0, atol=1e-13)


def test_pass_at_k_by_hand():
    # Of 1, 0, 0: with the first every pair's best is 1, without it 0; a 0 wins in one of two pairs, others always do.
    assert pass_at_k(torch.tensor([[1.0, 0.0, 0.0]]), k=2).tolist() == [[2.0, -1.0, -1.0]]
    # Two that win make a third one's failure cheap.
    assert pass_at_k(torch.tensor([[1.0, 1.0, 0.0]]), k=2).tolist() == [[0.0, 0.0, 0.0]]


def test_pass_at_1_is_leave_one_out():
    torch.manual_seed(0)
    reward_PG = torch.randn(4, 6, dtype=torch.float64)
    assert torch.allclose(pass_at_k(reward_PG, k=1), leave_one_out(reward_PG), rtol=0, atol=1e-14)


def test_pass_at_k_leaves_the_unscored_out():
    found = pass_at_k(torch.tensor([[1.0, NAN, 0.0, 0.0], [1.0, NAN, NAN, NAN], [1.0, 0.0, NAN, NAN]]), k=2)
    assert found[0].tolist() == [2.0, 0.0, -1.0, -1.0]
    assert found[1].tolist() == [0.0] * 4  # fewer than k are scored
    assert found[2].tolist() == [2.0, 0.0, 0.0, 0.0]  # k·(best of both − best of the other): 2·(1 − 0), 2·(1 − 1)


@pytest.mark.parametrize(("size", "k"), [(4, 0), (4, 5), (1, 1)])
def test_pass_at_k_needs_groups_of_k(size, k):
    with pytest.raises(ValueError, match=f"k={k}"):
        pass_at_k(torch.zeros(1, size), k=k)


def test_nonzero_rescaled_by_hand():
    # One group of three has a signal: α = 3.
    found = nonzero_rescaled(torch.tensor([[0.0, 2.0], [1.0, 1.0], [NAN, 4.0]]))
    assert found.tolist() == [[-3.0, 3.0], [0.0, 0.0], [0.0, 0.0]]
    assert nonzero_rescaled(torch.ones(2, 2)).tolist() == [[0.0, 0.0]] * 2


def test_per_reward_normalised_by_hand():
    # Each z is ±1/√2; summed with weights 1 and 2: 3/√2 and 1/√2, whose variance over the batch is 10/3.
    reward_PGK = torch.tensor([[[0.0, 0.0], [9.0, 1.0]], [[0.0, 8.0], [1.0, 0.0]]], dtype=torch.float64)
    found = per_reward_normalised(reward_PGK, torch.tensor([1.0, 2.0]), eps=0.0)
    low, high = 1 / math.sqrt(2) / math.sqrt(10 / 3), 3 / math.sqrt(2) / math.sqrt(10 / 3)
    assert found.flatten().tolist() == pytest.approx([-high, high, low, -low], abs=1e-15)


def test_a_reward_without_signal_adds_nothing():
    torch.manual_seed(0)
    one = torch.randn(2, 4, 1, dtype=torch.float64)
    both = torch.cat([one, torch.full_like(one, 0.95)], 2)
    alone = per_reward_normalised(one, torch.tensor([1.0]))
    assert torch.equal(per_reward_normalised(both, torch.tensor([1.0, 5.0])), alone)


def test_a_completion_with_one_of_its_rewards_unscored_is_left_out_of_all():
    torch.manual_seed(0)
    reward_PGK, weight_K = torch.randn(1, 4, 2, dtype=torch.float64), torch.tensor([1.0, 0.3])
    expected = per_reward_normalised(reward_PGK[:, [0, 2, 3]], weight_K)
    reward_PGK[0, 1, 0] = NAN
    found = per_reward_normalised(reward_PGK, weight_K)
    assert torch.allclose(found[:, [0, 2, 3]], expected, rtol=0, atol=1e-14)
    assert found[0, 1] == 0.0


def test_a_running_mean_by_hand():
    mean = ema(None, torch.tensor([[NAN, NAN]]), 0.9)
    assert mean is None
    mean = ema(mean, torch.tensor([[1.0, NAN], [5.0, 0.0]]), 0.9)
    assert mean == 2.0
    mean = ema(mean, torch.tensor([[7.0]]), 0.9)
    assert mean == pytest.approx(0.9 * 2 + 0.1 * 7)
    assert ema(mean, torch.tensor([[NAN]]), 0.9) == mean


def test_ema_baseline_by_hand():
    found = ema_baseline(torch.tensor([[1.0, NAN], [4.0, 4.0]]), 1.5)
    assert found.tolist() == [[-0.5, 0.0], [2.5, 2.5]]


def test_whiten_by_hand():
    assert whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1.0, 1.0])


def test_whitened_actions_have_mean_0_and_variance_1():
    torch.manual_seed(0)
    x_N = whiten(5 * torch.randn(1000, dtype=torch.float64) + 3)
    assert x_N.mean().item() == pytest.approx(0.0, abs=1e-14)
    assert x_N.var(correction=0).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("x", [[], [3.0], [0.1] * 7, [0.95] * 8])
def test_what_is_all_of_one_value_whitens_to_zeros(x):
    assert whiten(torch.tensor(x)).tolist() == [0.0] * len(x)
