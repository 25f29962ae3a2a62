"""The loss that fits a group to a target: values by hand, what it leaves alone, what it refuses."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from rlpost.objectives import target_policy
from rlpost.objectives.ragged import Ragged
from rlpost.objectives.weights import sequence_mean


def cross_entropy(logp, old, advantage, rows, eta=1.0):
    """Of the group, and its slope by every action's log-probability."""
    moving = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    old, advantage = (torch.tensor(x, dtype=torch.float64) for x in (old, advantage))
    loss = (target_policy(moving, old, advantage, rows, eta=eta) * sequence_mean(rows)).sum()
    return loss.item(), torch.autograd.grad(loss, moving)[0].tolist()


def test_its_group_mean_is_the_cross_entropy_of_target_and_policy():
    # Two completions, of 2 actions and of 1: p = (¼, ¾) over the group, old p = ½ each.
    logp, old = [log(0.5), log(0.5), log(0.75)], [log(0.4), log(0.5), log(0.2)]
    loss, slope = cross_entropy(logp, old, [0.5, 0.5, -0.5], Ragged([2, 1]), eta=0.5)
    first = exp(1.0) / (exp(1.0) + exp(-1.0))
    assert loss == pytest.approx(-(first * log(0.25) + (1 - first) * log(0.75)))
    assert slope == pytest.approx([0.25 - first, 0.25 - first, first - 0.25])


def test_completions_without_actions_are_no_members():
    logp, old, advantage = [-1.0, -2.0, -0.5], [-1.5, -1.0, -1.0], [1.0, 1.0, -1.0]
    whole = cross_entropy(logp, old, advantage, Ragged([2, 1]))
    assert cross_entropy(logp, old, advantage, Ragged([0, 2, 0, 1])) == whole
    assert target_policy(torch.zeros(0), torch.zeros(0), torch.zeros(0), Ragged([0, 0])).shape == (0,)


def test_half_precision_is_computed_with_in_float32():
    half = [torch.tensor(x, dtype=torch.bfloat16) for x in ([-1.0, -2.0], [-1.5, -1.0], [1.0, -1.0])]
    assert torch.equal(target_policy(*half, Ragged([1, 1])), target_policy(*(x.float() for x in half), Ragged([1, 1])))


@pytest.mark.parametrize("eta", [0.0, -1.0])
def test_a_temperature_must_be_positive(eta):
    with pytest.raises(ValueError, match=r"^eta=.*: the temperature of a target must be positive$"):
        target_policy(torch.zeros(1), torch.zeros(1), torch.zeros(1), Ragged([1]), eta=eta)
