"""Tests and intervals of `rlpost compare`, against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlpost.evaluate.comparison import cluster_bootstrap, compare_scores, corrected, holm, mcnemar, sign_flips


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 1), (8, 8), (30, 12), (400, 500)])
def test_mcnemar_is_the_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_are_the_permutation_test() -> None:
    change = np.random.default_rng(3).normal(0.3, 0.5, 10)
    expected = stats.permutation_test((change,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flips(change) == pytest.approx(expected)
    many = np.random.default_rng(4).normal(0.1, 0.5, 60)
    expected = stats.permutation_test((many,), np.mean, permutation_type="samples", n_resamples=99_999, rng=1).pvalue
    assert sign_flips(many) == pytest.approx(expected, abs=0.02)


def test_sign_flips_of_one_size_are_mcnemar() -> None:
    assert sign_flips(np.array([1.0] * 7 + [-1.0] * 2 + [0.0] * 5)) == pytest.approx(mcnemar(7, 2))


def test_the_bootstrap_draws_prompts_as_scipy_does() -> None:
    change = np.random.default_rng(5).normal(0.2, 0.4, 80)
    found = cluster_bootstrap(change)
    expected = stats.bootstrap((change,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert math.isnan(cluster_bootstrap(change[:1]).low)


def test_holm_is_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_small_gain_is_within_noise_and_a_large_one_is_not() -> None:
    before = [[0.0]] * 40
    few = compare_scores("greedy", "all", before, [[1.0]] * 4 + [[0.0]] * 36)
    many = compare_scores("greedy", "all", before, [[1.0]] * 20 + [[0.0]] * 20)
    few, many = corrected([few, many])
    assert (few.wins, few.losses, few.ties, few.verdict) == (4, 0, 36, "within noise")
    assert (many.test, many.verdict) == ("exact McNemar", "B is better")
    assert many.adjusted_p == pytest.approx(2 * many.p)
    (worse,) = corrected([compare_scores("greedy", "all", [[1.0]] * 20, [[0.0]] * 20)])
    assert worse.verdict == "A is better"
    assert worse.to_json()["difference"] == {"value": -1.0, "low": None, "high": None}


def test_samples_of_a_prompt_are_not_taken_for_independent() -> None:
    """Three prompts with a hundred samples each are three observations."""
    (found,) = corrected([compare_scores("sampled", "all", [[0.0] * 100] * 3, [[1.0] * 100] * 3)])
    assert found.test == "sign flips by prompt"
    assert found.p == pytest.approx(0.25)
    assert found.verdict == "within noise"
