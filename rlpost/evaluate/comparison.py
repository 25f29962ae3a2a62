"""Compare two sets of scores on the same prompts: difference, interval, exact tests, and Holm's correction.

P prompts, each with any number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rlpost.evaluate.statistics import Estimate, paired_difference

RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """B against A in one mode, on all prompts or a part of them."""

    mode: str
    """greedy or sampled."""
    part: str
    """`all`, or a slice."""
    prompts: int
    a: float
    """Mean score of A; likewise `b`."""
    b: float
    wins: int
    """Prompts that B answers better on average; likewise `losses` and `ties`."""
    losses: int
    ties: int
    difference: Estimate
    """Mean over prompts of B's mean score − A's, with its 95 % interval."""
    p: float
    """Probability of a difference at least as large, were A and B alike: exact McNemar or sign flips by prompt."""
    test: str
    adjusted_p: float = math.nan
    """`p` after Holm's correction for all comparisons made at once."""

    @property
    def verdict(self) -> str:
        """What may be said of it, in a few words."""
        if not self.adjusted_p < 0.05:
            return "within noise"
        return "B is better" if self.difference.value > 0 else "A is better"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data; an interval that is not known is null."""
        difference = {key: None if math.isnan(v) else v for key, v in asdict(self.difference).items()}
        return {**asdict(self), "difference": difference, "verdict": self.verdict}


def compare_scores(
    mode: str, part: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0
) -> Comparison:
    """Compare the scores [P][n] of B with those of A.

    One answer a prompt, right or wrong: McNemar's exact test and the paired t interval. Otherwise a prompt's answers
    are dependent: sign flips of whole prompts, and the interval of a bootstrap that draws whole prompts.

    Raises:
        ValueError: different numbers of prompts, or a prompt without scores.
    """
    difference = paired_difference(b, a)
    change_P = np.array([np.mean(new) - np.mean(old) for new, old in zip(b, a, strict=True)])
    change_P[np.abs(change_P) < 1e-12] = 0.0
    wins, losses = int((change_P > 0).sum()), int((change_P < 0).sum())
    single = all(len(row) == 1 and row[0] in (0.0, 1.0) for row in (*a, *b))
    if single:
        p, test = mcnemar(wins, losses), "exact McNemar"
    else:
        p, test = sign_flips(change_P, seed), "sign flips by prompt"
        difference = cluster_bootstrap(change_P, seed)
    before, after = (float(np.mean([np.mean(row) for row in scores])) for scores in (a, b))
    ties = len(change_P) - wins - losses
    return Comparison(mode, part, len(change_P), before, after, wins, losses, ties, difference, p, test)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p of McNemar's test (1947, Psychometrika 12): wins + losses fair coins, as lopsided or more."""
    n, fewer = wins + losses, min(wins, losses)
    ways = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * ways / (1 << n))


def sign_flips(change_P: np.ndarray[Any, Any], seed: int = 0) -> float:
    """Two-sided p of the mean change [P] when each prompt's sign is a fair coin; McNemar's if all changes are ±1.

    All 2^P sign patterns up to P = 12 prompts that changed, else `RESAMPLES` random ones (and the observed one).
    """
    moved_M = change_P[change_P != 0]
    count = len(moved_M)
    # A sum that differs from the observed one by rounding alone is as large.
    observed = abs(float(moved_M.sum())) * (1 - 1e-9)
    if count <= 12:
        patterns = np.arange(2**count)[:, None] >> np.arange(count)[None, :] & 1
        return float((np.abs((2 * patterns - 1) @ moved_M) >= observed).mean())
    random = np.random.default_rng(seed)
    as_large = 0
    for _ in range(RESAMPLES // 100):
        signs = 2 * random.integers(0, 2, size=(100, count), dtype=np.int8) - 1
        as_large += int((np.abs(signs @ moved_M) >= observed).sum())
    return (as_large + 1) / (RESAMPLES + 1)


def cluster_bootstrap(change_P: np.ndarray[Any, Any], seed: int = 0, level: float = 0.95) -> Estimate:
    """Mean change [P] with the percentile interval of means over prompts drawn with replacement; NaN for one prompt."""
    value = float(change_P.mean())
    count = len(change_P)
    if count < 2 or (change_P == change_P[0]).all():
        return Estimate(value, math.nan, math.nan)
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [change_P[random.integers(0, count, size=(100, count))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p of tests made at once, in the same order (Holm 1979, Scandinavian J. of Statistics 6)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted = [0.0] * len(p)
    most = 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = most
    return adjusted


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with `adjusted_p`."""
    found = holm([c.p for c in comparisons])
    return [replace(c, adjusted_p=p) for c, p in zip(comparisons, found, strict=True)]
