"""Baselines from probabilities, columns and earlier steps, and the surrogate that counts from the reference."""

from __future__ import annotations

import math

import pytest
import torch

from rlpost.objectives.advantages import ema_baseline, leave_one_out
from rlpost.objectives.baselines import (
    column_baseline,
    optimal_token_baseline,
    optimal_value,
    role_baseline,
    squared_score,
)
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.regression import advantage_regression

NAN = float("nan")


def numbers(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def of_norms(*norms: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and collisions whose squared score is given: 1 − 2p + c with p = ½, so that c is the norm."""
    norm_N = numbers(*norms)
    return torch.full_like(norm_N, math.log(0.5)), norm_N.log()


def test_the_squared_score_is_that_of_the_derivative_by_the_logits():
    torch.manual_seed(0)
    logits_V = (3 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    logp_V = logits_V.log_softmax(0)
    found = squared_score(logp_V.detach(), (2 * logp_V.detach()).logsumexp(0).expand(5))
    for v in range(5):
        (slope_V,) = torch.autograd.grad(logp_V[v], logits_V, retain_graph=True)
        assert found[v].item() == pytest.approx(slope_V.square().sum().item(), rel=1e-12)


def test_a_sure_action_has_no_squared_score_and_never_less_than_none():
    assert squared_score(torch.tensor([0.0]), torch.tensor([0.0])).tolist() == [0.0]
    # Rounded to float32 apart, 1 − 2p + Σp² may come out below 0.
    assert squared_score(torch.tensor([-5.9e-8]), torch.tensor([-2.4e-7])).tolist() == [0.0]


ROWS = Ragged([2, 1, 3])
NORMS = (1.0, 1.0, 3.0, 2.0, 2.0, 1.0)
"""Of a group of three, whose third completion goes on alone."""
REWARDS = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("form", "baseline"),
    [
        # W: 1, 2; 3; 2, 4, 5.
        ({}, [5 / 6, 10 / 6, 5 / 6, 5 / 6, 10 / 6, 2.0]),
        ({"accumulate": False}, [5 / 6, 5 / 3, 5 / 6, 5 / 6, 5 / 3, 2.0]),
        ({"leave_one_out": True}, [4 / 5, 2.0, 5 / 3, 1 / 4, 1.0, 0.5]),
        ({"leave_one_out": True, "accumulate": False}, [4 / 5, 2.0, 5 / 3, 1 / 4, 1.0, 0.5]),
    ],
    ids=["as published", "of the action alone", "of the others", "of the others, of the action alone"],
)
def test_the_optimal_token_baseline_by_hand(form, baseline):
    found = optimal_token_baseline(REWARDS, *of_norms(*NORMS), ROWS, **form)
    reward_N = ROWS.spread(REWARDS[0])
    assert found.tolist() == pytest.approx([r - b for r, b in zip(reward_N.tolist(), baseline, strict=True)])


def test_weights_of_the_others_accumulate():
    rows = Ragged([2, 2, 2])
    norms = of_norms(1, 1, 1, 3, 2, 0.5)
    found = optimal_token_baseline(REWARDS, *norms, rows, leave_one_out=True)
    # Of the first two, at their second action: (0·4 + 2·2.5)/6.5 and (1·2 + 2·2.5)/4.5.
    assert found[[1, 3]].tolist() == pytest.approx([1 - 5 / 6.5, 0 - 7 / 4.5])


def test_with_equal_norms_the_others_baseline_is_their_mean():
    torch.manual_seed(0)
    reward_PG, rows = torch.randn(2, 3, dtype=torch.float64), Ragged([4] * 6)
    norms = of_norms(*[0.7] * 24)
    found = optimal_token_baseline(reward_PG, *norms, rows, leave_one_out=True)
    assert torch.allclose(found, rows.spread(leave_one_out(reward_PG).flatten()), rtol=0, atol=1e-12)


def test_groups_of_one_reward_of_one_completion_and_unscored_ones():
    reward_PG = torch.tensor([[0.1, 0.1, 0.1], [3.0, NAN, 1.0], [NAN, 5.0, NAN]])
    rows = Ragged([1, 2, 3, 2, 0, 1, 0, 2, 0])
    for alone in (True, False):
        found = optimal_token_baseline(reward_PG, *of_norms(*range(1, 12)), rows, leave_one_out=alone)
        assert found[:6].tolist() == [0.0] * 6
        assert found[9:].tolist() == [0.0] * 2
        # 7, 15 and 9: beside an unscored one, which counts nowhere.
        first = 3.0 - (1.0 if alone else (3 * 7 + 9) / 16)
        assert found[6:9].tolist() == pytest.approx([first, 2.0 if alone else 0.0, -2.0 if alone else 1 - 30 / 16])
        assert found.dtype == torch.float32


def test_an_unscored_completion_with_actions_has_no_part():
    rows, norms = Ragged([1, 1, 1]), of_norms(1, 5, 2)
    found = optimal_token_baseline(torch.tensor([[1.0, NAN, 4.0]]), *norms, rows)
    assert found.tolist() == pytest.approx([1 - 3, 0.0, 4 - 3])


def test_where_no_action_can_move_its_logits_the_mean_is_the_baseline():
    sure = torch.zeros(3), torch.zeros(3)
    assert optimal_token_baseline(REWARDS, *sure, Ragged([1, 1, 1])).tolist() == [0.0, -1.0, 1.0]
    assert optimal_token_baseline(REWARDS, *sure, Ragged([1, 1, 1]), leave_one_out=True).tolist() == [0.0, -1.5, 1.5]


def test_small_weights_of_the_others_keep_their_digits():
    found = optimal_token_baseline(REWARDS, *of_norms(1e9, 2e-9, 1e-9), Ragged([1, 1, 1]), leave_one_out=True)
    assert found[0].item() == pytest.approx(1 - 2 / 3, rel=1e-12)


def test_rows_must_be_those_of_the_groups():
    with pytest.raises(ValueError, match="2 completions are not 1 groups of 3"):
        optimal_token_baseline(REWARDS, *of_norms(1, 1), Ragged([1, 1]))


def test_a_baseline_of_the_role_and_of_a_column_by_hand():
    reward_PG = torch.tensor([[1.0, NAN], [4.0, 0.0]])
    by_role = role_baseline(reward_PG, numbers(0.5, 3.0), by="seat")
    assert by_role.tolist() == column_baseline(reward_PG, numbers(0.5, 3.0), column="value").tolist()
    assert by_role.tolist() == [[0.5, 0.0], [1.0, -3.0]]
    assert by_role.dtype == torch.float32


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_running_mean_that_would_not_move_or_would_run_away_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        role_baseline(REWARDS, numbers(0), by="seat", decay=decay)
    with pytest.raises(ValueError, match=f"decay={decay}"):
        ema_baseline(REWARDS, 0.0, decay=decay)


def test_the_optimal_value_by_hand():
    found = optimal_value(torch.tensor([[0.0, 1.0, NAN], [2.0, 2.0, 2.0], [NAN] * 3], dtype=torch.float64), beta=0.5)
    assert found[0].item() == pytest.approx(0.5 * math.log((1 + math.exp(2)) / 2))
    assert found[1].item() == pytest.approx(2.0)
    assert found[2].isnan()


def test_the_optimal_value_is_between_mean_and_best():
    reward_PG = numbers(0.0, 1.0, 3.0)[None]
    assert optimal_value(reward_PG, beta=1e6).item() == pytest.approx(4 / 3, abs=1e-5)
    assert optimal_value(reward_PG, beta=1e-3).item() == pytest.approx(3.0, abs=2e-3)
    assert optimal_value(1000 * reward_PG.float(), beta=1e-2).isfinite()
    with pytest.raises(ValueError, match="beta=0"):
        optimal_value(reward_PG, beta=0.0)


def test_advantage_regression_by_hand():
    rows = Ragged([2, 0, 1])
    logp, reference = numbers(-1, -2, -3).requires_grad_(), numbers(-1.5, -2.5, -2)
    advantage = numbers(0.5, 0.5, -1)
    loss_N = advantage_regression(logp, reference, advantage, rows, beta=0.5)
    # Δ is 1 and −1: (½ − ½)² and (−½ + 1)², over 1.
    assert loss_N.tolist() == [0.0, 0.0, 0.25]
    moved = advantage_regression(logp, reference, 2 * advantage, rows, beta=0.5)
    (slope_N,) = torch.autograd.grad((moved / rows.spread(rows.lengths_S)).sum(), logp)
    # βΔ − A of each completion, at all of its actions.
    assert slope_N.tolist() == [-0.5, -0.5, 1.5]


def test_advantages_of_a_completions_actions_are_averaged():
    rows, zero = Ragged([2]), numbers(0, 0)
    found = advantage_regression(zero, zero, numbers(1, 3), rows, beta=1.0)
    assert found.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="beta=0"):
        advantage_regression(zero, zero, zero, rows, beta=0.0)
