"""Importance weights between two policies by hand."""

import pytest
import torch

from rlpost.objectives.correction import correction, off_policy_ratio
from rlpost.objectives.ragged import Ragged

ROWS = Ragged([2, 0, 1])


def log(*ratios: float) -> torch.Tensor:
    """Log-probabilities whose ratio to one of 0 is as given."""
    return torch.tensor(ratios, dtype=torch.float64).log()


ENGINE = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2.0, 0.5, 0.25]),
        ({"cap": 3.0}, [3.0, 0.5, 0.25]),
        ({"cap": 8.0, "floor": 0.5}, [4.0, 0.5, 0.25]),  # a floor is the mask's
        ({"mode": "mask"}, [0.0, 0.5, 0.25]),
        ({"mode": "mask", "cap": 8.0, "floor": 0.4}, [4.0, 0.5, 0.0]),
        ({"per": "completion"}, [2.0, 2.0, 0.25]),
        ({"per": "completion", "cap": 1.5}, [1.5, 1.5, 0.25]),
        ({"per": "completion", "mode": "mask", "cap": 1.5}, [0.0, 0.0, 0.25]),
        ({"per": "completion", "mode": "mask", "floor": 0.4}, [2.0, 2.0, 0.0]),
    ],
)
def test_corrections_by_hand(settings, expected):
    assert correction(log(4.0, 0.5, 0.25), ENGINE, ROWS, **settings).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("per", ["token", "completion"])
def test_policies_that_agree_need_none(mode, per):
    logp = log(0.1, 0.7, 0.2)
    assert correction(logp, logp, ROWS, per=per, mode=mode).tolist() == [1.0] * 3


def test_a_correction_is_a_constant_to_the_gradient():
    assert not correction(log(0.5, 0.5, 0.5).requires_grad_(), ENGINE, ROWS).requires_grad


def test_off_policy_ratios_by_hand():
    logp = log(4.0, 0.5, 0.25).requires_grad_()
    assert off_policy_ratio(logp, ENGINE, ROWS).tolist() == pytest.approx([2.0, 2.0, 0.25])
    assert off_policy_ratio(logp, ENGINE, ROWS, per="token").tolist() == pytest.approx([4.0, 0.5, 0.25])
    # ∇ of one completion's ratio, which stands at both of its actions.
    off_policy_ratio(logp, ENGINE, ROWS).sum().backward()
    assert logp.grad.tolist() == pytest.approx([4.0, 4.0, 0.25])


@pytest.mark.parametrize("per", ["token", "completion"])
def test_absurd_log_ratios_are_clamped(per):
    far = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    ratio = off_policy_ratio(far, torch.zeros(2), Ragged([1, 1]), per=per)
    assert ratio.log().tolist() == pytest.approx([-20.0, 20.0])
    # Over a completion the clamp is of the sum: what cancels is no reason to.
    assert off_policy_ratio(far, torch.zeros(2), Ragged([2])).tolist() == [1.0, 1.0]


def test_only_whole_completions_make_another_policys_samples_unbiased():
    """Two tokens over two letters, all four sequences: E_b[w·r] at the first action."""
    first = torch.tensor([0.9, 0.1], dtype=torch.float64)
    second = torch.tensor([[0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)  # after the first letter
    reward, expected = 0.0, 0.0
    by_token = 0.0
    for a in (0, 1):
        for b in (0, 1):
            logp = torch.stack([first[a], second[a, b]]).log()
            behaviour = torch.full((2,), 0.5, dtype=torch.float64).log()
            worth = 1.0 if b == 0 else 0.0
            expected += logp.sum().exp().item() * worth
            reward += 0.25 * off_policy_ratio(logp, behaviour, Ragged([2]))[0].item() * worth
            by_token += 0.25 * off_policy_ratio(logp, behaviour, Ragged([2]), per="token")[0].item() * worth
    assert reward == pytest.approx(expected, abs=1e-15)
    assert abs(by_token - expected) > 0.1


def test_what_is_refused():
    with pytest.raises(ValueError, match="`truncate` or `mask`"):
        correction(ENGINE, ENGINE, ROWS, mode="drop")
    for ratio in (correction, off_policy_ratio):
        with pytest.raises(ValueError, match="`token` or of a `completion`"):
            ratio(ENGINE, ENGINE, ROWS, per="step")
