from __future__ import annotations

import pytest

from rlpost.errors import RecipeError
from rlpost.rewards.text import ends, length, pattern, repetition
from rlpost.types import Completion


def said(text: str = "", ids: tuple[int, ...] = (), finish: str = "stop") -> Completion:
    return Completion(ids=ids, action=(True,) * len(ids), text=text, finish=finish)


def test_ends_tells_cut_completions_from_finished_ones():
    assert [ends(said(finish=f)) for f in ("stop", "length", "")] == [1.0, 0.0, None]


def test_pattern_searches_or_matches_the_whole_text():
    answer = said("<think>a\nb</think><answer>7</answer>")
    assert pattern(answer, regex=r"<answer>\d+</answer>") == 1.0
    assert pattern(answer, regex=r"<answer>\d+</answer>", whole=True) == 0.0
    assert pattern(answer, regex=r"<think>.*</think>", whole=True) == 0.0
    assert pattern(answer, regex=r"<think>.*</think><answer>.*</answer>", whole=True) == 1.0


def test_pattern_refuses_a_broken_regex():
    with pytest.raises(RecipeError, match=r"pattern: regex '\(a' is not a regular expression"):
        pattern(said(), regex="(a")


@pytest.mark.parametrize(
    ("tokens", "expected"), [(100, 0.0), (125, -0.5), (150, -1.0), (300, -1.0), (75, -0.25), (0, -0.5)]
)
def test_length_costs_grow_over_the_width_and_stay(tokens: int, expected: float):
    assert length(said(ids=(5,) * tokens), target=100, width=50, over=1.0, under=0.5) == expected


def test_length_counts_only_tokens_the_policy_chose():
    turns = Completion(ids=(1, 2, 3, 4), action=(True, False, False, True))
    assert length(turns, target=1) == -1.0
    assert length(turns, target=2) == 0.0


def test_length_refuses_a_target_of_zero():
    with pytest.raises(RecipeError, match="target 0"):
        length(said(), target=0)


def test_repetition_by_hand():
    assert repetition(said(ids=(7, 8, 7, 8)), n=2) == pytest.approx(-1 / 3)
    assert repetition(said(ids=(7, 7, 7, 7)), n=1) == pytest.approx(-3 / 4)
    assert repetition(said(ids=(1, 2, 3, 4)), n=2) == 0.0
    assert repetition(said(ids=(1, 2)), n=3) == 0.0


def test_repetition_ignores_tokens_of_others():
    turns = Completion(ids=(1, 9, 9, 9, 2), action=(True, False, False, False, True))
    assert repetition(turns, n=1) == 0.0


def test_repetition_refuses_zero():
    with pytest.raises(RecipeError, match="n is 0"):
        repetition(said(), n=0)
