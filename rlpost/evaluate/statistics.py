"""Statistics of an evaluation: intervals that treat a prompt's samples as dependent, pass@k, maj@k.

P prompts with n samples each; a score is a number, usually 1 for right and 0 for wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

MOST_FREEDOM = 100_000


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Example: 8 of 10 right is ``Estimate(value=0.8, low=0.4901, high=0.9433)`` at level 0.95.
    """

    value: float
    low: float
    """NaN if there is no interval (a single prompt); likewise `high`."""
    high: float


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """Share of successes among n independent trials, with the score interval of Wilson (1927, JASA 22).

    centre = (p + z²/2n)/(1 + z²/n), half width = z·√(p(1−p)/n + z²/4n²)/(1 + z²/n); never outside [0, 1], and
    of sensible width at 0 and n successes.

    Raises:
        ValueError: no trials, or `successes` or `level` out of range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials; count at least one trial")
    return _score_interval(successes / n, n, _normal(_upper(level)))


def _score_interval(p: float, n: float, z: float) -> Estimate:
    """Wilson's interval of a share p of n trials, for z standard errors; n need not be whole."""
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At the ends centre ± half is 0 or 1 up to rounding.
    low = 0.0 if p == 0 else max(0.0, centre - half)
    high = 1.0 if p == 1 else min(1.0, centre + half)
    return Estimate(p, low, high)


def upper_bound(successes: int, trials: int, level: float = 0.95) -> float:
    """The largest probability consistent with so few successes: exact (Clopper & Pearson 1934, Biometrika 26).

    The p with P(X <= successes) = 1 − level for X ~ Binomial(trials, p). One-sided: of all experiments, at most a
    share of 1 − level finds a bound below the truth. After 0 of n it is 1 − (1 − level)^(1/n), about 3/n.

    Raises:
        ValueError: no trials, or `successes` or `level` out of range.
    """
    if trials < 1 or not 0 <= successes <= trials or not 0 < level < 1:
        raise ValueError(f"{successes} successes of {trials} trials at level {level}; count at least one trial")
    if successes == trials:
        return 1.0
    ways = [math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in range(successes + 1)]
    log_ways, k = np.array(ways), np.arange(successes + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        at_most = float(np.exp(log_ways + k * math.log(p) + (trials - k) * math.log1p(-p)).sum())
        low, high = (p, high) if at_most > 1 - level else (low, p)
    return high


def clustered_mean(scores: Sequence[Sequence[float]], level: float = 0.95) -> Estimate:
    """Mean of all scores [P][n], with an interval that counts prompts, not samples, as independent.

    Cluster-robust standard error, √(P/(P−1) · Σ_p (Σ_i (y_pi − mean))²)/N, and Student's t with P − 1 degrees
    of freedom (Liang & Zeger 1986, Biometrika 73; Cameron & Miller 2015, J. Human Resources 50; for model
    evaluations Miller 2024, arXiv:2411.00640). Prompts may have different numbers of samples; those with none
    are left out. If all scores are equal there is no interval, since nothing is known of their spread. For scores
    between 0 and 1, prefer `clustered_share`.

    Raises:
        ValueError: there are no scores, or `level` is out of range.
    """
    prompts = [np.asarray(samples, dtype=np.float64) for samples in scores if len(samples)]
    if not prompts:
        raise ValueError("no scores; give at least one prompt with a score")
    count, total = len(prompts), sum(map(len, prompts))
    upper = _upper(level)
    value = math.fsum(float(samples.sum()) for samples in prompts) / total
    if count == 1 or all((samples == prompts[0][0]).all() for samples in prompts):
        return Estimate(value, math.nan, math.nan)
    squares = math.fsum(float((samples - value).sum()) ** 2 for samples in prompts)
    half = student_t(upper, count - 1) * math.sqrt(count / (count - 1) * squares) / total
    return Estimate(value, value - half, value + half)


def clustered_share(scores: Sequence[Sequence[float]], level: float = 0.95) -> Estimate:
    """Mean of scores between 0 and 1 [P][n], right and wrong above all; prompts count as independent, samples do not.

    Wilson's interval of as many trials as would have the cluster-robust variance, n* = p(1−p)·N²/Σ_p e_p² with
    e_p = Σ_i (y_pi − p): never outside [0, 1], never a point, and lopsided where the share is near 0 or 1, as its error
    is (Korn & Graubard 1998, Survey Methodology 24, take Clopper & Pearson's of as many). n* is an estimate too, a poor
    one where few prompts hold all the successes: in the place of z stands Student's t with Satterthwaite's
    2P/(kurtosis of e − 1) degrees of freedom (1946, Biometrics Bulletin 2), 2/(the squared relative error of Σe²).

    One sample a prompt, or samples that never disagree, are `wilson` over the prompts; so are equal scores throughout.
    scripts/coverage.py measures how often the truth is inside (docs/intervals.md).

    Raises:
        ValueError: a score is outside [0, 1], or as in `clustered_mean`.
    """
    prompts = [np.asarray(samples, dtype=np.float64) for samples in scores if len(samples)]
    if not prompts:
        raise ValueError("no scores; give at least one prompt with a score")
    upper = _upper(level)
    everything = np.concatenate(prompts)
    if not ((everything >= 0) & (everything <= 1)).all():
        raise ValueError("a score is outside 0 to 1; use clustered_mean")
    count, total = len(prompts), len(everything)
    value = math.fsum(everything) / total
    binary = bool(np.isin(everything, (0.0, 1.0)).all())
    excess_P = np.array([math.fsum(samples - value) for samples in prompts])
    squares = float((excess_P**2).sum())
    agreed = binary and all((samples == samples[0]).all() for samples in prompts)
    if agreed and len({len(samples) for samples in prompts}) == 1:
        return wilson(sum(int(samples[0]) for samples in prompts), count, level)
    if count == 1:
        return Estimate(value, math.nan, math.nan)
    if squares <= 1e-20 * total**2:
        # The effective number of prompts, which have different numbers of samples (Kish 1965).
        return _score_interval(value, total**2 / sum(len(samples) ** 2 for samples in prompts), _normal(upper))
    trials = value * (1 - value) * total**2 / squares
    if binary:
        trials = min(trials, float(total))
    kurtosis = count * float((excess_P**4).sum()) / squares**2
    freedom = max(1, int(min(2 * count / max(kurtosis - 1, 1e-9), MOST_FREEDOM)))
    return _score_interval(value, trials, _normal(upper) if agreed else student_t(upper, freedom))


def paired_difference(
    after: Sequence[Sequence[float]], before: Sequence[Sequence[float]], level: float = 0.95
) -> Estimate:
    """Mean over prompts of (mean score after − mean score before) on the same prompts, with its t interval.

    Pairing takes the prompts' difficulty out of the noise: this interval can exclude 0 where
    `intervals_overlap`.

    Raises:
        ValueError: different numbers of prompts, or a prompt without scores.
    """
    if len(after) != len(before) or not all(map(len, [*after, *before])):
        raise ValueError(f"{len(after)} and {len(before)} prompts; give scores of the same prompts, none empty")
    differences = [[float(np.mean(new)) - float(np.mean(old))] for new, old in zip(after, before, strict=True)]
    return clustered_mean(differences, level)


def intervals_overlap(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals share a point; an unknown interval overlaps every other.

    Intervals apart mean different values; intervals that overlap leave it open (see `paired_difference`).
    """
    return not (a.high < b.low or b.high < a.low)


def pass_at_k(n: int, successes: int, k: int) -> float:
    """Chance that k of a prompt's n samples hold a right one: 1 − C(n−c, k)/C(n, k).

    Unbiased for k fresh samples (Chen et al. 2021, arXiv:2107.03374); as a product, so that nothing
    overflows.

    Raises:
        ValueError: not 0 ≤ successes ≤ n, or not 1 ≤ k ≤ n.
    """
    if not 0 <= successes <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {successes} of {n} samples; k is at least 1 and at most the samples")
    if n - successes < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - successes + 1, n + 1))


def majority_at_k(answers: Sequence[Hashable | None], scores: Sequence[float]) -> float:
    """Score [] of the answer that most of a prompt's k samples gave; equal answers count as one.

    Tie rule: answers with equally many votes share the result, that is, the expected score when one of them
    is picked at random; the order of samples does not matter. None is no answer and no vote; no votes at all
    score 0. An answer's score is the mean over its samples.

    Raises:
        ValueError: different numbers of answers and scores, or none.
    """
    if len(answers) != len(scores) or not answers:
        raise ValueError(f"{len(answers)} answers and {len(scores)} scores; give one score an answer")
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winning = [s for a, s in zip(answers, scores, strict=True) if a is not None and votes[a] == most]
    return math.fsum(winning) / len(winning)


@cache
def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t with a whole number of degrees of freedom, for a probability in [0.5, 1).

    The distribution in closed form, a sum over powers of cos θ with t = √ν·tan θ (Abramowitz & Stegun 1964,
    26.7.3 and 26.7.4), inverted by halving an interval of θ.

    Raises:
        ValueError: `probability` or `freedom` is out of range.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"probability {probability}, freedom {freedom}; give one in [0.5, 1) and at least 1")
    if freedom > MOST_FREEDOM:  # where t and the normal distribution differ by less than 1e-4 of a quantile
        return NormalDist().inv_cdf(probability)
    odd = freedom % 2
    # odd: 1, 2/3, 2·4/(3·5), ...   even: 1, 1/2, 1·3/(2·4), ...
    steps = np.arange(1, (freedom - odd) // 2)
    coefficients = np.cumprod(
        np.concatenate(([1.0], 2 * steps / (2 * steps + 1) if odd else (2 * steps - 1) / (2 * steps)))
    )
    powers = 2 * np.arange(len(coefficients)) + odd

    def central(theta: float) -> float:
        """P(|T| <= √ν·tan θ)."""
        series = float(np.dot(coefficients, math.cos(theta) ** powers)) if freedom > 1 else 0.0
        inside = math.sin(theta) * series
        return 2 / math.pi * (theta + inside) if odd else inside

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _normal(upper: float) -> float:
    return NormalDist().inv_cdf(upper)


def _upper(level: float) -> float:
    """The probability below a two-sided interval's upper end."""
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not a confidence level; give one between 0 and 1, such as 0.95")
    return 0.5 + level / 2
