"""What actions cost in entropy, and a bonus that is there when it is needed."""

import pytest
import torch

from rlpost.objectives.entropy import action_covariance, adaptive_entropy


def test_covariance_by_hand():
    logp, advantage = torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([1.0, 0.0, -1.0])
    assert action_covariance(logp, advantage).tolist() == [2.0, 0.0, 3.0]
    assert action_covariance(logp - 1, advantage + 1).tolist() == [2.0, 0.0, 3.0]
    assert action_covariance(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert action_covariance(logp.bfloat16(), advantage.bfloat16()).dtype == torch.float32


def test_the_bonus_counts_at_the_target_and_below():
    assert adaptive_entropy(0.25, 0.5, target=0.5, delta=0.125) == (0.25, 0.375)
    assert adaptive_entropy(0.25, 0.4, target=0.5, delta=0.125) == (0.25, 0.375)
    assert adaptive_entropy(0.25, 0.6, target=0.5, delta=0.125) == (0.0, 0.125)
    assert adaptive_entropy(0.25, 0.6, target=0.5) == (0.0, 0.245)


def test_the_coefficient_stays_within_its_bounds():
    assert adaptive_entropy(0.25, 0.1, target=0.5, delta=0.5, largest=0.5) == (0.25, 0.5)
    assert adaptive_entropy(0.25, 0.9, target=0.5, delta=0.5, largest=0.5) == (0.0, 0.0)


@pytest.mark.parametrize("wrong", [{"coef": -0.1}, {"coef": 1.1}, {"delta": 0.0}])
def test_coefficients_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="coef="):
        adaptive_entropy(**{"coef": 0.0, "entropy": 0.5, "target": 0.5, **wrong})
