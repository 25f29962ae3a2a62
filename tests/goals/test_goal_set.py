"""Sets of endings: what ends in them, how far along a text is, and what they cost."""

from __future__ import annotations

import random

import pytest

from rlpost.errors import DataError
from rlpost.goals.goal_set import GoalSet, ends_in
from rlpost.goals.trie import Trie
from rlpost.types import Completion


def test_the_arrays_of_three_members_by_hand():
    trie = Trie([(4,), (3, 6), (3, 5), (3, 6)])
    assert trie.token_E.tolist() == [3, 4, 5, 6]
    assert trie.first_X.tolist() == [0, 2, 4, 4, 4, 4]
    assert trie.ends_X.tolist() == [False, False, True, True, True]
    assert trie.depth == 2


def some(seed: int, count: int, vocabulary: int = 4, longest: int = 5) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(vocabulary) for _ in range(draw.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_looking_at_every_member(seed):
    members, texts = some(seed, 12), [(), *some(seed + 100, 300, longest=7)]
    goals = GoalSet(members)
    assert len(goals) == len(set(members))
    for text in texts:
        assert goals.reached(text) == any(text[len(text) - len(m) :] == m for m in members if len(m) <= len(text))
        begun = [k for k in range(len(text) + 1) for m in members if k <= len(m) and text[len(text) - k :] == m[:k]]
        assert goals.progress(text) == max(begun)


def test_a_lookup_takes_a_step_a_token_however_many_members(monkeypatch):
    """More members mean more to halve among the first tokens, and no further step."""
    taken = []
    real = Trie.step
    monkeypatch.setattr(Trie, "step", lambda *a: taken.append(a) or real(*a))
    for count in (10, 100_000):
        members = [m for m in some(0, 2 * count, vocabulary=50, longest=6) if len(m) == 6]
        goals = GoalSet(members)
        for text in (*members[:50], *some(1, 50, vocabulary=50, longest=20)):
            taken.clear()
            goals.reached(text)
            assert len(taken) <= 6


def test_nine_bytes_a_node():
    goals = GoalSet([(i % 7, i % 11, i) for i in range(1000)])
    assert goals.bytes <= 9 * 2 * (1 + 3 * 1000) + 100


@pytest.mark.parametrize(
    ("completion", "truncated_counts", "expected"),
    [
        (Completion((5, 7, 0), (True,) * 3, finish="stop"), False, True),
        (Completion((7, 5, 0), (True,) * 3, finish="stop"), False, False),
        (Completion((5, 7), (True,) * 2, finish="length"), False, False),
        (Completion((5, 7), (True,) * 2, finish="length"), True, True),
        (Completion((0,), (True,), finish="stop"), False, False),
    ],
)
def test_where_a_completion_ends(completion, truncated_counts, expected):
    assert ends_in(GoalSet([(7,)]), completion, [0], truncated_counts=truncated_counts) is expected


@pytest.mark.parametrize(("members", "said"), [([], "no members"), ([(1,), ()], "member 2 is empty")])
def test_sets_that_mean_nothing_are_refused(members, said):
    with pytest.raises(DataError, match=said):
        GoalSet(members, "goals.txt")
