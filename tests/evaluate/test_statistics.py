from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from coverage import POPULATIONS, coverage
from scipy import stats

from rlpost.evaluate.statistics import (
    Estimate,
    clustered_mean,
    clustered_share,
    intervals_overlap,
    majority_at_k,
    paired_difference,
    pass_at_k,
    student_t,
    upper_bound,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 6000), (3, 10), (9, 10), (120, 6000), (7, 100_000)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_upper_bound_is_scipys(successes: int, n: int, level: float):
    # One side of scipy's two-sided interval of twice the error.
    expected = stats.binomtest(successes, n, alternative="less").proportion_ci(level, method="exact").high
    assert upper_bound(successes, n, level) == pytest.approx(expected, rel=1e-8)


def test_upper_bound_by_hand():
    assert upper_bound(0, 1) == pytest.approx(0.95)
    assert upper_bound(0, 6000) == pytest.approx(1 - 0.05 ** (1 / 6000))  # about 3/n
    assert upper_bound(1, 2, level=0.75) == pytest.approx(0.75**0.5)  # P(X <= 1) = 1 − p²
    assert upper_bound(5, 5) == 1.0


def test_a_bound_is_below_the_truth_as_seldom_as_it_says():
    """Summed over all outcomes of 40 trials."""
    for p in (0.01, 0.1, 0.5, 0.97):
        missed = sum(stats.binom.pmf(k, 40, p) for k in range(41) if upper_bound(k, 40) < p)
        assert missed <= 0.05


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 0, 0.9), (3, 2, 0.9), (-1, 2, 0.9), (1, 2, 1.0)])
def test_upper_bound_refuses_what_cannot_be(successes: int, n: int, level: float):
    with pytest.raises(ValueError, match="count at least one trial"):
        upper_bound(successes, n, level)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 10), (8, 10), (50, 100), (999, 1000), (7, 100_000)])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_wilson_is_scipys(successes: int, n: int, level: float):
    expected = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    found = wilson(successes, n, level)
    assert found.value == successes / n
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_wilson_by_hand():
    # z = 1.959964, z² = 3.841459; (0.8 + 3.841459/20)/(1.3841459) = 0.716739
    # half = 1.959964·√(0.016 + 3.841459/400)/1.3841459 = 0.226578
    found = wilson(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.490162, abs=1e-5), pytest.approx(0.943318, abs=1e-5))


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_the_impossible(successes: int, n: int, level: float):
    with pytest.raises(ValueError, match=r"successes of|not a confidence level"):
        wilson(successes, n, level)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31, 200, 9_999, 100_000])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.995, 0.9999])
def test_student_t_is_scipys(probability: float, freedom: int):
    assert student_t(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-8, abs=1e-8)


def test_student_t_beyond_its_series():
    assert student_t(0.975, 1_000_000) == pytest.approx(stats.t.ppf(0.975, 1_000_000), rel=1e-4)


def test_one_sample_a_prompt_is_the_ordinary_t_interval():
    values = [0.0, 1.0, 1.0, 0.5, 2.0]
    found = clustered_mean([[v] for v in values])
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert found.value == pytest.approx(0.9)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_samples_of_one_prompt_are_no_new_evidence():
    once = clustered_mean([[0.0], [1.0], [1.0]])
    often = clustered_mean([[0.0] * 50, [1.0] * 50, [1.0] * 50])
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_clusters_of_different_sizes_by_hand():
    # Mean 3/4; residual sums 1/4 and 2·1/4 - 3/4 = -1/4; error √(2/1 · (1/16 + 1/16))/4 = 0.125.
    # t(0.975, 1) = 12.7062.
    found = clustered_mean([[1.0], [1.0, 1.0, 0.0], []])
    assert found.value == 0.75
    assert found.high - found.value == pytest.approx(12.7062 * 0.125, rel=1e-5)


def test_one_prompt_says_nothing_about_others():
    found = clustered_mean([[0.0, 1.0]])
    assert found.value == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(clustered_share([[0.0, 1.0]]).low)


def test_shares_stay_inside_and_are_never_certain():
    assert clustered_share([[1.0] * 4] * 10) == wilson(10, 10)
    assert clustered_share([[0.0] * 4] * 10) == wilson(0, 10)
    assert clustered_mean([[1.0], [1.0], [0.0]]).high > 1.0
    for scores in (
        [[1.0, 1.0], [1.0, 0.0]],
        [[0.0] * 9, [1.0]],
        [[0.5, 0.5]] * 3,
        [[0.25], [0.75]],
        [[1.0] * 3, [1.0]],
    ):
        found = clustered_share(scores)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0.1
    with pytest.raises(ValueError, match="outside 0 to 1"):
        clustered_share([[0.5], [-0.1]])
    with pytest.raises(ValueError, match="outside 0 to 1"):
        clustered_share([[0.5], [math.nan]])


@pytest.mark.parametrize("right", range(9))
@pytest.mark.parametrize("samples", [1, 5])
def test_prompts_whose_samples_agree_are_trials(right: int, samples: int):
    assert clustered_share([[1.0] * samples] * right + [[0.0] * samples] * (8 - right)) == wilson(right, 8)


def test_a_share_of_prompts_with_unlike_numbers_of_samples_by_hand():
    # p = 1/2 of 6 samples; e = (1/2, −1/2 · 2, 1/2); Σe² = 3/2, so n* = ¼·36/1.5 = 6: no more than the samples.
    # Kurtosis 3·(1/16 + 1 + 1/16)/(9/4) = 1.5, freedom 6/0.5 = 12, t = 2.178813.
    found = clustered_share([[1.0], [0.0, 0.0], [1.0, 1.0, 0.0]])
    scale = 1 + 2.178813**2 / 6
    half = 2.178813 * math.sqrt(0.25 / 6 + 2.178813**2 / 144) / scale
    assert found.value == 0.5
    assert (found.low, found.high) == (pytest.approx(0.5 - half, abs=1e-6), pytest.approx(0.5 + half, abs=1e-6))
    # All wrong: worth (1 + 2 + 3)²/(1 + 4 + 9) prompts.
    assert clustered_share([[0.0], [0.0] * 2, [0.0] * 3]).high == pytest.approx(1.959964**2 / (36 / 14 + 1.959964**2))


def test_equal_scores_of_an_unknown_scale_have_no_interval():
    found = clustered_mean([[7.0, 7.0], [7.0]])
    assert (found.value, math.isnan(found.low), math.isnan(found.high)) == (7.0, True, True)


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="no scores"):
        clustered_mean([[], []])
    with pytest.raises(ValueError, match="not a confidence level"):
        clustered_mean([[1.0], [0.0]], level=1.5)


def test_coverage_of_the_wilson_interval():
    random = np.random.default_rng(0)
    hits = random.binomial(100, 0.3, size=2_000)
    covered = np.mean([wilson(int(h), 100).low <= 0.3 <= wilson(int(h), 100).high for h in hits])
    # Exact coverage is 0.940 here; 2,000 draws have a standard error of 0.005.
    assert 0.925 < covered < 0.965


def test_coverage_of_the_clustered_interval_where_the_naive_one_fails():
    random = np.random.default_rng(1)
    prompts, samples, draws = 60, 8, 2_000
    rates = random.beta(1.0, 1.0, size=(draws, prompts))  # prompts differ in difficulty; the mean is 1/2
    hits = random.binomial(samples, rates)
    covered = naive = 0
    for row in hits:
        found = clustered_share([[1.0] * int(h) + [0.0] * (samples - int(h)) for h in row])
        covered += found.low <= 0.5 <= found.high
        flat = wilson(int(row.sum()), prompts * samples)
        naive += flat.low <= 0.5 <= flat.high
    assert 0.935 < covered / draws < 0.965  # 0.95 within three standard errors
    assert naive / draws < 0.8


@pytest.mark.slow
def test_coverage_where_few_prompts_hold_the_successes():
    """scripts/coverage.py at 250 draws, with a standard error of 0.014; its own table has 2,000."""
    found = {
        (name, size): coverage(population, *size, draws=250, seed=1)
        for name, population in POPULATIONS.items()
        for size in ((20, 4), (20, 16))
    }
    for way in ("share", "pass@2"):
        shares = [row[way] for row in found.values()]
        assert min(shares) > 0.95 - 5 * 0.014
        assert 0.94 < np.mean(shares) < 0.98
    (student,) = [row["t"] for (name, size), row in found.items() if name.startswith("rarely") and size == (20, 4)]
    assert student < 0.88


def test_coverage_of_prompts_with_unlike_numbers_of_samples():
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(500):
        rates, samples = random.beta(0.2, 1.8, 40), random.integers(1, 9, 40)
        scores = [(random.random(n) < r).astype(float).tolist() for r, n in zip(rates, samples, strict=True)]
        found = clustered_share(scores)
        covered += found.low <= 0.1 <= found.high
    assert 0.92 < covered / 500 < 0.985


def test_pass_at_k_of_nothing_solved_is_no_point():
    for solved in (0, 4):
        found = clustered_share([[pass_at_k(4, solved, 2)] for _ in range(8)])
        assert found == wilson(8 * (solved > 0), 8)
        assert found.high - found.low > 0.3


def test_pass_at_k_by_hand_and_by_counting():
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(5, 3, 3) == 1.0
    for n, c, k in [(6, 2, 3), (7, 1, 4), (8, 4, 2)]:
        draws = list(combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


def test_pass_at_k_is_stable_and_agrees_with_the_formula():
    assert pass_at_k(100_000, 10, 50_000) == pytest.approx(
        1 - math.comb(99_990, 50_000) / math.comb(100_000, 50_000), rel=1e-9
    )


def test_pass_at_k_is_unbiased():
    n, k, rate = 6, 3, 0.3
    expected = sum(math.comb(n, c) * rate**c * (1 - rate) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - rate) ** k, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),
        (["8", "7"], [0, 1], 0.5),
        (["7", "8", "9"], [1, 0, 0], 1 / 3),
        ([None, None, "7"], [0, 0, 1], 1.0),
        ([None, None], [0, 0], 0.0),
        (["7", "7", "8", "8", "9"], [1, 1, 0, 0, 1], 0.5),
    ],
)
def test_majority(answers: list[str | None], scores: list[float], expected: float):
    assert majority_at_k(answers, scores) == pytest.approx(expected)


def test_majority_wants_a_score_an_answer():
    with pytest.raises(ValueError, match="one score an answer"):
        majority_at_k(["7"], [])


def test_overlap():
    a, b, c = Estimate(0.5, 0.4, 0.6), Estimate(0.65, 0.6, 0.7), Estimate(0.8, 0.75, 0.9)
    assert intervals_overlap(a, b)
    assert intervals_overlap(b, a)
    assert not intervals_overlap(a, c)
    assert not intervals_overlap(c, a)
    assert intervals_overlap(a, Estimate(0.9, math.nan, math.nan))


def test_pairing_finds_what_overlap_hides():
    before = [[p / 10] for p in range(10)]
    after = [[p / 10 + 0.05 + 0.01 * (p % 2)] for p in range(10)]
    found = paired_difference(after, before)
    low, high = stats.ttest_rel([a[0] for a in after], [b[0] for b in before]).confidence_interval(0.95)
    assert found.value == pytest.approx(0.055)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.low > 0
    assert intervals_overlap(clustered_mean(after), clustered_mean(before))


def test_pairing_averages_each_prompts_samples_first():
    found = paired_difference([[1.0, 0.0], [1.0]], [[0.0], [0.0, 0.0, 1.0]])
    assert found.value == pytest.approx((0.5 + 2 / 3) / 2)


def test_pairing_refuses_different_prompts():
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([[1.0]], [[1.0], [0.0]])
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([[]], [[1.0]])
