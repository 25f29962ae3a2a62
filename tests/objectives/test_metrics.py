"""Metrics by hand, and that an update may be cut."""

import math
from itertools import pairwise

import pytest
import torch

from rlpost.objectives.metrics import (
    clipped_high,
    clipped_low,
    effective_sample_parts,
    effective_sample_share,
    explained_variance,
    explained_variance_parts,
    without_parts,
)
from rlpost.objectives.surrogates import clipped_share


def means(parts: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: x.double().mean().item() for name, x in parts.items()}


def critic() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    returns = torch.randn(50, dtype=torch.float64) + 3
    return returns + 0.5 * torch.randn(50, dtype=torch.float64) + 1, returns


def test_clipped_low_and_high_by_hand():
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9, 1.5], dtype=torch.float64).log()
    old, advantage = torch.zeros(7), torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0])
    assert clipped_low(logp, old, advantage).tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert clipped_high(logp, old, advantage).tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert clipped_low(logp, old, advantage, clip_low=0.05).tolist() == [0, 0, 0, 1, 0, 1, 0]
    assert clipped_high(logp, old, advantage, clip_high=0.05).tolist() == [1, 0, 0, 0, 1, 0, 0]


def test_low_and_high_are_the_clipped_share():
    torch.manual_seed(0)
    logp, advantage = torch.randn(2, 200, dtype=torch.float64)
    old = torch.zeros(200)
    both = clipped_low(logp, old, advantage, clip_low=0.3) + clipped_high(logp, old, advantage, clip_high=0.1)
    assert torch.equal(both, clipped_share(logp, old, advantage, clip_low=0.3, clip_high=0.1))


def test_explained_variance_by_hand():
    # Var(R) = 4, R − V = (0, 1), whose variance is ¼.
    parts = explained_variance_parts(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0]))
    assert explained_variance(means(parts)) == 1 - 0.25 / 4


def test_explained_variance_from_its_parts_is_the_direct_formula():
    value, returns = critic()
    direct = 1 - (returns - value).var(correction=0) / returns.var(correction=0)
    assert explained_variance(means(explained_variance_parts(value, returns))) == pytest.approx(direct.item())


def test_its_limits():
    returns = torch.tensor([1.0, 2.0, 6.0])
    for value, expected in ((returns + 7, 1.0), (torch.full((3,), 9.0), 0.0), (2 * returns.mean() - returns, -3.0)):
        assert explained_variance(means(explained_variance_parts(value, returns))) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.95])
def test_equal_returns_leave_nothing_to_explain(reward, dtype):
    equal = torch.full((7,), reward, dtype=dtype)
    assert explained_variance(means(explained_variance_parts(torch.arange(7.0), equal))) == 0.0


def test_effective_samples_by_hand():
    assert effective_sample_share(means(effective_sample_parts(torch.tensor([1.0, 3.0])))) == 16 / (2 * 10)
    assert effective_sample_share(means(effective_sample_parts(torch.tensor([0.7] * 4)))) == pytest.approx(1.0)
    assert effective_sample_share(means(effective_sample_parts(torch.tensor([0.0, 0.0, 0.0, 5.0])))) == 0.25
    assert effective_sample_share(means(effective_sample_parts(torch.zeros(3)))) == 0.0


@pytest.mark.parametrize("cuts", [[1, 2, 3], [25], [0, 49]])
def test_the_number_does_not_depend_on_how_an_update_is_cut(cuts):
    value, returns = critic()
    edges = [0, *cuts, 50]
    for make, number in (
        (lambda at: explained_variance_parts(value[at], returns[at]), explained_variance),
        (lambda at: effective_sample_parts(value[at].exp()), effective_sample_share),
    ):
        whole = number(means(make(slice(None))))
        pieces = [make(slice(a, b)) for a, b in pairwise(edges)]
        joined = {name: sum(piece[name].sum().item() for piece in pieces) / 50 for name in pieces[0]}
        assert number(joined) == pytest.approx(whole, abs=1e-12)


def test_a_mean_of_the_parts_own_numbers_is_another_number():
    # Each half alone has equal returns, which a critic cannot explain; together they vary.
    value = returns = torch.tensor([1.0, 1.0, 5.0, 5.0])
    halves = [explained_variance(means(explained_variance_parts(value[at], returns[at]))) for at in ([0, 1], [2, 3])]
    assert halves == [0.0, 0.0]
    assert explained_variance(means(explained_variance_parts(value, returns))) == 1.0


def test_parts_carry_no_gradient_and_are_widened():
    value = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    for parts, dtype in (
        (explained_variance_parts(value, value), torch.float64),
        (effective_sample_parts(value), torch.float32),
    ):
        assert all(not x.requires_grad and x.dtype == dtype for x in parts.values())


def test_a_log_line_shows_the_numbers_and_not_what_they_are_made_of():
    weight = torch.tensor([1.0, 3.0])
    parts = effective_sample_parts(weight) | explained_variance_parts(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5]))
    line = without_parts({"loss": 2.0, **means(parts)})
    assert line == {"loss": 2.0, "explained_variance": 1 - 0.25 / 4, "effective_samples": 0.8}
    assert without_parts({"entropy": math.pi}) == {"entropy": math.pi}
