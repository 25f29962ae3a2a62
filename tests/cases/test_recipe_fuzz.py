"""Recipes and overrides of any kind: resolved, or refused in a message, and never a traceback."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from fuzz_recipes import case, outcome
from typos import copy_recipes

SMALL = ("sft_chat", "dpo_pairs", "dpo_identity", "grpo_math")


QUICK = (0, 300, SMALL)
SLOW = pytest.param(0, 2000, (), marks=pytest.mark.slow)


@pytest.mark.parametrize(("first", "count", "names"), [QUICK, SLOW])
def test_no_recipe_ends_in_a_traceback(first: int, count: int, names: tuple[str, ...], here: Path, tally) -> None:
    copy_recipes(here)
    found: collections.Counter[str] = collections.Counter()
    for number in range(first, first + count):
        told = outcome(case(number, names), here)
        assert told in ("resolved", "refused"), f"case {number}: {told}"
        found[told] += 1
    assert found["resolved"] > count / 100  # most are wrong in several ways
    assert found["refused"] > count / 2
    tally("recipes of any kind", right=found["resolved"], refused=found["refused"])
