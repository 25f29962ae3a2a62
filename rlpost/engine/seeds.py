"""Counter-based random numbers: what a row draws at a step is a hash of its prompt's seed, its index and the step.

No generator is advanced, so a row's numbers do not depend on which other rows run, or in which order.
The hash is SplitMix64's finaliser (Steele, Lea, Flood 2014) applied once per coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Sequence[int], index: Sequence[int], steps: int) -> NDArray[np.float64]:
    """[B, steps] numbers strictly between 0 and 1.

    Args:
        seeds: [B] the 64-bit seed of each row's prompt.
        index: [B] which of its prompt's completions the row is.
        steps: numbers a row.
    """
    row_B = _rows(seeds, index)
    bits = _hash(row_B[:, None] + _GOLDEN * np.arange(1, steps + 1, dtype=np.uint64))
    # 52 bits and a half: with 53 the largest would round to 1.
    result: NDArray[np.float64] = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return result


def row_seed(seed: int, index: int) -> int:
    """A 64-bit seed for one row, for a sampler that has its own generator for each.

    Args:
        seed: of the row's prompt.
        index: which of its prompt's completions it is.
    """
    return int(_rows([seed], [index])[0])


def prompt_seeds(seed: int, first: int, count: int) -> list[int]:
    """The seeds of prompts number `first` to `first + count` of a run (or step) with this seed."""
    number = np.arange(first, first + count, dtype=np.uint64)
    seeds: list[int] = _hash(_hash(_words([seed])) ^ _hash(number)).tolist()
    return seeds


def _rows(seeds: Sequence[int], index: Sequence[int]) -> NDArray[np.uint64]:
    return _hash(_hash(_words(seeds)) + _GOLDEN * _words(index))


def _words(numbers: Sequence[int]) -> NDArray[np.uint64]:
    return np.array([n & _MASK for n in numbers], np.uint64)


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
