"""Credit over turns by hand, and what it has in common with credit over completions and tokens."""

import pytest
import torch

from rlpost.objectives.advantages import group_normalised, leave_one_out
from rlpost.objectives.credit import Steps, gae, process, return_to_go
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.turns import gigpo, turn_gae, turn_leave_one_out, turn_normalised


def numbers(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


@pytest.fixture
def steps() -> Steps:
    """A group of three: turns of 2 and 1 actions; no action; turns of 1, 1 and 2."""
    return Steps(Ragged([3, 0, 4]), torch.tensor([0, 1, 1, 1, 1, 0, 1]).bool())


def test_turns_begin_after_the_one_before(steps):
    assert steps.first_K.tolist() == [0, 2, 3, 4, 5]
    none = Steps(Ragged([0]), torch.zeros(0, dtype=torch.bool))
    assert none.first_K.tolist() == []


def test_turn_gae_by_hand(steps):
    # First: δ = (1 + ½·4 − 2, 6 − 4) = (1, 2), A = (1 + ¼·2, 2). Last, cut, with 8 beyond: δ = (0, 0, 1 + ½·8 − 2).
    advantage, returns = turn_gae(
        numbers(1, 6, 1, 0, 1),
        numbers(2, 4, 2, 2, 2),
        steps,
        gamma=0.5,
        gae_lambda=0.5,
        bootstrap_S=numbers(0, 99, 8),
    )
    assert returns.tolist() == [3.5, 6, 2 + 3 / 16 - 0.25, 2 - 1 + 0.75, 5]
    assert advantage.tolist() == [1.5, 1.5, 2, 3 / 16 - 0.25, -0.25, 3, 3]


def test_turns_of_one_token_are_tokens():
    torch.manual_seed(0)
    rows = Ragged([3, 0, 2])
    steps = Steps(rows, torch.ones(5, dtype=torch.bool))
    reward, value, beyond = torch.randn(5), torch.randn(5), torch.randn(3)
    options = {"gamma": 0.9, "gae_lambda": 0.7, "bootstrap_S": beyond}
    for by_turn, by_token in zip(
        turn_gae(reward, value, steps, **options), gae(reward, value, rows, **options), strict=True
    ):
        assert torch.equal(by_turn, by_token)


def test_turn_leave_one_out_by_hand(steps):
    # Returns from each turn on: 7 and 6; 2, 1 and 1. From turn 0 on 7 against 2, from turn 1 on 6 against 1; alone
    # in turn 2 there is no one to compare with.
    found = turn_leave_one_out(numbers(1, 6, 1, 0, 1), steps, 3)
    assert found.tolist() == [5, 5, 5, -5, -5, 1, 1]
    # ½: 4 and 6; 1¼, ½ and 1.
    discounted = turn_leave_one_out(numbers(1, 6, 1, 0, 1), steps, 3, gamma=0.5)
    assert discounted.tolist() == [2.75, 2.75, 5.5, -2.75, -5.5, 1, 1]


def test_one_turn_a_completion_is_what_completions_are():
    torch.manual_seed(1)
    rows = Ragged([2, 1, 3, 1, 1, 2])
    whole = Steps(rows, torch.zeros(10, dtype=torch.bool))
    reward_PG = torch.randn(2, 3, dtype=torch.float64)
    for by_turn, by_group in ((turn_leave_one_out, leave_one_out), (turn_normalised, group_normalised)):
        expected = rows.spread(by_group(reward_PG).flatten())
        assert torch.allclose(by_turn(reward_PG.flatten(), whole, 3), expected, rtol=0, atol=1e-14)
    # The prompt is the state of all of them: both parts say the same.
    both = gigpo(reward_PG.flatten(), whole, torch.zeros(6, dtype=torch.long), 3, omega=2.0)
    assert torch.allclose(both, 3 * expected, rtol=0, atol=1e-14)


def test_groups_are_kept_apart():
    torch.manual_seed(2)
    rows, ends = [3, 4, 2, 5], [0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1]
    steps = Steps(Ragged(rows), torch.tensor(ends).bool())
    reward, anchor = torch.randn(9, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 2])
    assert steps.count_S.tolist() == [2, 3, 2, 2]

    def every(steps, reward, anchor):
        return torch.stack(
            [
                turn_leave_one_out(reward, steps, 2),
                turn_normalised(reward, steps, 2),
                gigpo(reward, steps, anchor, 2),
            ]
        )

    halves = [
        every(Steps(Ragged(rows[:2]), torch.tensor(ends[:7]).bool()), reward[:5], anchor[:5]),
        every(Steps(Ragged(rows[2:]), torch.tensor(ends[7:]).bool()), reward[5:], anchor[5:]),
    ]
    assert torch.allclose(every(steps, reward, anchor), torch.cat(halves, 1), rtol=0, atol=1e-14)


def test_a_group_of_one_has_its_return(steps):
    reward = numbers(1, 6, 1, 0, 1)
    assert turn_leave_one_out(reward, steps, 1).tolist() == process(reward, steps, how="last").tolist()
    assert turn_normalised(reward, steps, 1).tolist() == [0.0] * 7


def test_turn_normalised_by_hand(steps):
    # Of 7 and 2, and of 6 and 1, the standard deviation is 5/√2.
    found = turn_normalised(numbers(1, 6, 1, 0, 1), steps, 3, eps=0.0)
    half = 0.5**0.5
    assert found.tolist() == pytest.approx([half, half, half, -half, -half, 0, 0], abs=1e-15)


def test_gigpo_by_hand(steps):
    # Episodes: 7 against 2. States a b; a a b: returns 7, 2 and 1 in a, 6 and 1 in b.
    anchor = torch.tensor([0, 1, 0, 0, 1])
    found = gigpo(numbers(1, 6, 1, 0, 1), steps, anchor, 3, omega=0.5, std=False)
    assert found.tolist() == pytest.approx(
        [2.5 + (7 - 10 / 3) / 2] * 2
        + [2.5 + 1.25]
        + [-2.5 + (2 - 10 / 3) / 2, -2.5 + (1 - 10 / 3) / 2]
        + [-2.5 - 1.25] * 2
    )
    whole = gigpo(numbers(1, 6, 1, 0, 1), steps, anchor, 3, omega=0.0, eps=0.0)
    assert whole.tolist() == pytest.approx([0.5**0.5] * 3 + [-(0.5**0.5)] * 4)


def test_equal_returns_carry_no_signal_whatever_rounding_says():
    steps = Steps(Ragged([1] * 7), torch.ones(7, dtype=torch.bool))
    alike = torch.full((7,), 0.1)
    assert turn_leave_one_out(alike, steps, 7).tolist() == [0.0] * 7
    assert turn_normalised(alike, steps, 7, eps=1e-9).tolist() == [0.0] * 7
    assert gigpo(alike, steps, torch.zeros(7, dtype=torch.long), 7, eps=1e-9).tolist() == [0.0] * 7


def test_rewards_before_a_turn_are_none_of_its_business(steps):
    """What turn 0 earned changes nothing from turn 1 on."""
    first, second = numbers(1, 6, 1, 0, 1), numbers(100, 6, -7, 0, 1)
    later = steps.step_N % 5 != 0
    later &= steps.step_N != 2
    for estimator in (turn_leave_one_out, turn_normalised):
        before, after = (estimator(x, steps, 3) for x in (first, second))
        assert torch.equal(before[later], after[later])
        assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, s: turn_leave_one_out(x, s, 2),
        lambda x, s: turn_normalised(x, s, 0),
        lambda x, s: gigpo(x, s, torch.zeros(5, dtype=torch.long), 2),
    ],
)
def test_refused_if_they_are_no_whole_groups(call, steps):
    with pytest.raises(ValueError, match="3 completions are not groups of"):
        call(numbers(1, 6, 1, 0, 1), steps)


def test_returns_are_the_targets_of_a_critic_at_lambda_one(steps):
    reward, value = numbers(1, 6, 1, 0, 1), numbers(3, 1, 4, 1, 5)
    _, returns = turn_gae(reward, value, steps, gamma=0.5, gae_lambda=1.0)
    assert torch.allclose(returns, return_to_go(reward, Ragged(steps.count_S), gamma=0.5), rtol=0, atol=1e-14)
