"""How often the evaluator's 95 % intervals hold the truth, by simulation, for prompts of known rates.

    python scripts/coverage.py [--draws 2000]

Prompts are drawn from a population of success rates, answers from each prompt's rate. A row is a population and a size,
prompts × samples a prompt; a column is what an evaluation says: the share of right answers, pass@2, the majority's, and
a mean by Student's t for comparison, which is what graded scores outside [0, 1] get.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlpost.evaluate.statistics import Estimate, clustered_mean, clustered_share, majority_at_k, pass_at_k

Rates = NDArray[np.float64]
SIZES = ((8, 4), (20, 4), (100, 4), (20, 16))


@dataclass(frozen=True)
class Population:
    """Success rates of prompts."""

    draw: Callable[[np.random.Generator, int], Rates]
    mean: float
    pass_at_2: float

    def majority(self, samples: int) -> float:
        """How often most of a prompt's answers are right, a tie counting half, where all wrong ones agree."""
        rate = self.draw(np.random.default_rng(0), 400_000)
        found = np.zeros_like(rate)
        for right in range((samples + 1) // 2, samples + 1):
            won = 0.5 if 2 * right == samples else 1.0
            found += won * math.comb(samples, right) * rate**right * (1 - rate) ** (samples - right)
        return float(found.mean())


def beta(a: float, b: float) -> Population:
    """Rates after Beta(a, b)."""
    both_fail = b * (b + 1) / ((a + b) * (a + b + 1))
    return Population(lambda random, n: random.beta(a, b, n), a / (a + b), 1 - both_fail)


def two(share: float, high: float, low: float) -> Population:
    """One rate for some prompts, another for the rest."""
    both_fail = share * (1 - high) ** 2 + (1 - share) * (1 - low) ** 2
    mean = share * high + (1 - share) * low
    return Population(lambda random, n: np.where(random.random(n) < share, high, low), mean, 1 - both_fail)


POPULATIONS = {
    "rarely solved: Beta(0.1, 1.9)": beta(0.1, 1.9),
    "seldom solved: Beta(0.2, 1.8)": beta(0.2, 1.8),
    "all or nothing: Beta(0.3, 0.3)": beta(0.3, 0.3),
    "of all kinds: Beta(1, 1)": beta(1, 1),
    "mostly solved: Beta(9, 1)": beta(9, 1),
}
BEYOND = {"all alike: 0.9": two(1.0, 0.9, 0.9), "one in twenty 0.9, the others 0.02": two(0.05, 0.9, 0.02)}
"""Hardest for a method that expects prompts to differ, and for all methods: twenty prompts often have none of the rare
kind, and then say nothing of it."""


def inside(estimate: Estimate, truth: float) -> bool:
    """Whether an interval holds the truth; none at all does not."""
    return estimate.low - 1e-12 <= truth <= estimate.high + 1e-12


def answers(population: Population, prompts: int, samples: int, random: np.random.Generator) -> list[list[float]]:
    """[P][n] right and wrong answers."""
    rate_P = population.draw(random, prompts)
    return (random.random((prompts, samples)) < rate_P[:, None]).astype(float).tolist()


Scores = list[list[float]]


def share(scores: Scores) -> Estimate:
    """The share of right answers."""
    return clustered_share(scores)


def pass_at_2(scores: Scores) -> Estimate:
    """pass@2, as the evaluator computes it."""
    return clustered_share([[pass_at_k(len(row), int(sum(row)), 2)] for row in scores])


def majority(scores: Scores) -> Estimate:
    """The answer that most samples of a prompt agree on."""
    return clustered_share([[majority_at_k([str(x) for x in row], row)] for row in scores])


COLUMNS = {"share": share, "pass@2": pass_at_2, "majority": majority, "t": clustered_mean}


def coverage(population: Population, prompts: int, samples: int, draws: int, seed: int = 0) -> dict[str, float]:
    """column -> how many of all intervals held the truth."""
    random = np.random.default_rng(seed)
    found = dict.fromkeys(COLUMNS, 0)
    truth = dict.fromkeys(COLUMNS, population.mean)
    truth |= {"pass@2": population.pass_at_2, "majority": population.majority(samples)}
    for _ in range(draws):
        scores = answers(population, prompts, samples, random)
        for name, column in COLUMNS.items():
            found[name] += inside(column(scores), truth[name])
    return {name: hits / draws for name, hits in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args().draws
    print(f"{'rates of prompts':36} {'size':>8}", *(f"{name:>8}" for name in COLUMNS))
    for name, population in {**POPULATIONS, **BEYOND}.items():
        for prompts, samples in SIZES:
            row = coverage(population, prompts, samples, draws)
            print(f"{name:36} {f'{prompts}×{samples}':>8}", *(f"{100 * x:8.1f}" for x in row.values()), flush=True)


if __name__ == "__main__":
    main()
