"""Trees of rewards: what nodes make of their children, and what is logged of them."""

from __future__ import annotations

from typing import Any

import pytest

from rlpost.errors import RecipeError, RewardError
from rlpost.rewards.score import Scorer, joined
from rlpost.rewards.tree import BoundReward, Node, gate, least, lexicographic, product, shaped, weighted_sum
from rlpost.types import Completion, Group


def group(*texts: str) -> Group:
    return Group((1,), tuple(Completion((3,), (True,), text) for text in texts), {"answer": "4"})


def right(completion, example):
    return float(completion.text == example["answer"])


def size(completion):
    return None if not completion.text else float(len(completion.text))


def marks(completion, steps):
    return [float(step.isdigit()) for step in steps]


def all_marks(all_steps):
    return [[float(len(step)) for step in own] for own in all_steps]


def leaf(function: Any, weight: float = 1.0) -> BoundReward:
    return BoundReward(function.__name__, weight, function)


def test_nodes_by_hand():
    assert weighted_sum([1.0, 2.0], [1.0, 0.5]) == 2.0
    assert weighted_sum([1.0, None], [1.0, 0.0]) == 1.0
    assert weighted_sum([1.0, None], [1.0, 0.1]) is None
    assert product([0.5, 4.0], [9.0, 9.0]) == 2.0
    assert product([0.5, None], [1.0, 1.0]) is None
    assert least([0.5, -1.0], [1.0, 1.0]) == -1.0
    assert least([None, -1.0], [1.0, 1.0]) is None


@pytest.mark.parametrize(
    ("guard", "then", "value"),
    [(1.0, 3.0, 6.0), (0.5, 3.0, 0.0), (0.0, None, 0.0), (None, 3.0, None), (1.0, None, None)],
)
def test_a_gate_asks_what_follows_only_if_its_guard_passed(guard, then, value):
    assert gate([guard, then], [1.0, 2.0]) == value
    assert gate([0.3, 3.0], [1.0, 1.0], above=0.2) == 3.0


def test_the_first_decides_and_the_next_only_between_equals():
    levels = [(a, b, c) for a in (0, 1, 2) for b in (0, 1, 2) for c in (0, 1, 2)]
    values = [lexicographic([float(x) for x in level], [1.0] * 3, scale=2.0) for level in levels]
    assert values == sorted(values)
    assert len(set(values)) == len(values)
    assert lexicographic([1.0, None], [1.0, 1.0]) is None
    with pytest.raises(RecipeError, match="a value of -3 is beyond scale=2 - raise scale"):
        lexicographic([1.0, -3.0], [1.0, 1.0], scale=2.0)


def test_a_tree_is_summed_at_the_top_and_every_node_is_logged():
    tree = Node("both", 2.0, "gate", [leaf(size), Node("inner", 1.0, "product", [leaf(right)])], {"above": 0.5})
    scores = Scorer([tree]).score([group("4", "five", "")])
    assert scores.total == [[2.0, 0.0, None]]
    assert scores.by_name == {
        "both": [[1.0, 0.0, None]],
        "size": [[1.0, 4.0, None]],
        "inner": [[1.0, 0.0, 0.0]],
        "right": [[1.0, 0.0, 0.0]],
    }
    assert Scorer([tree]).weights == {"both": 2.0}


def test_names_are_unique_in_the_whole_tree():
    with pytest.raises(RecipeError, match="two are called 'right'"):
        Scorer([leaf(right), Node("n", 1.0, "sum", [leaf(right)])])


def test_rewards_by_step_add_up_and_are_kept_by_step():
    scores = Scorer([leaf(marks, 0.5), leaf(all_marks)]).score([group("12", "a3")], [["1", "2"], ["a", "33"]])
    assert scores.by_step == {"marks": [[1.0, 1.0], [0.0, 1.0]], "all_marks": [[1.0, 1.0], [1.0, 2.0]]}
    assert scores.by_name == {"marks": [[2.0, 1.0]], "all_marks": [[2.0, 3.0]]}
    assert scores.total == [[3.0, 3.5]]


def test_rewards_by_step_need_steps_and_a_number_for_each():
    with pytest.raises(RecipeError, match="marks rewards steps; say what ends one with the stage's `step_end`"):
        Scorer([leaf(marks)]).score([group("1")])

    def short(completion, steps):
        return [1.0]

    with pytest.raises(RewardError, match=r"short returned a list .* for 2 steps"):
        Scorer([leaf(short)]).score([group("12")], [["1", "2"]])

    def unsure(completion, steps):
        return [None]

    with pytest.raises(RewardError, match="unsure returned None for a step"):
        Scorer([leaf(unsure)]).score([group("1")], [["1"]])


def test_a_reward_may_ask_for_whole_groups_and_a_model():
    def judged(groups, model):
        return [model + len(c.text) for g in groups for c in g.completions]

    scores = Scorer([BoundReward("judged", 1.0, judged, model=10)]).score([group("1", "22"), group("333")])
    assert scores.total == [[11.0, 12.0], [13.0]]


def test_scores_of_several_calls_can_be_put_together_in_any_order():
    scorer = Scorer([leaf(marks), leaf(right, 3.0)])
    first = scorer.score([group("4", "b"), group("5")], [["4"], ["b"], ["5"]])
    second = scorer.score([group("c", "4")], [["c"], ["4"]])
    both = joined([first, second], [2, 0])
    assert both.total == [[0.0, 4.0], [4.0, 0.0]]
    assert both.by_step == {"marks": [[0.0], [1.0], [1.0], [0.0]]}
    assert both.by_name["right"] == [[0.0, 1.0], [1.0, 0.0]]


def test_shaping_telescopes_to_nothing():
    assert shaped([0.5, 2.0, 7.0]) == [0.5, 1.5, -2.0]
    assert shaped([0.5, 2.0, 7.0], gamma=0.5) == [0.25, 0.5, -2.0]
    assert shaped([7.0]) == [0.0]
    assert shaped([]) == []


def test_a_shaping_node_rewards_steps():
    scorer = Scorer([leaf(right), Node("progress", 2.0, "shaping", [leaf(marks)])])
    found = scorer.score([group("4", "x")], steps=[["1", "4"], ["a", "2", "b"]])
    assert found.by_step["progress"] == [[1.0, -1.0], [0.0, 1.0, -1.0]]
    assert found.by_name["progress"] == [[0.0, 0.0]]
    assert found.total == [[1.0, 0.0]]


def test_shaping_needs_a_potential_by_step():
    scorer = Scorer([Node("progress", 1.0, "shaping", [leaf(right)])])
    with pytest.raises(RecipeError, match="progress shapes by step and right rewards whole completions"):
        scorer.score([group("4")])


def of_three(*digits: str) -> Group:
    """A completion of three steps each, with the steps as its text."""
    return Group((1,), tuple(Completion((3,) * 3, (True,) * 3, text, steps=(1, 1, 1)) for text in digits))


def three_long(completion):
    return float(completion.text != "1a2")


def ends_with_digit(completion):
    return float(completion.text[-1].isdigit())


def test_a_sum_and_an_open_gate_give_steps_what_their_children_do():
    """As with a hierarchy of rewards of whole completions; what is of the whole completion counts at its last step."""
    both = Node("both", 3.0, "sum", [leaf(marks, 2.0), leaf(ends_with_digit, 0.5), leaf(size, 0.0)])
    scorer = Scorer([Node("gated", 1.0, "gate", [leaf(three_long), both])])
    texts = ("12a", "1a2", "a12", "aaa")
    found = scorer.score([of_three(*texts)], steps=[list(text) for text in texts])
    assert found.by_step["both"] == [[2, 2, 0], [2, 0, 2.5], [0, 2, 2.5], [0, 0, 0]]
    assert found.by_step["gated"] == [[6, 6, 0], [0, 0, 0], [0, 6, 7.5], [0, 0, 0]]
    assert found.total == [[12, 0, 13.5, 0]]
    assert [sum(own) for own in found.by_step["gated"]] == found.total[0]


@pytest.mark.parametrize("kind", ["product", "min", "lexicographic"])
def test_what_is_no_sum_over_steps_is_of_the_whole_completion(kind):
    args = {"scale": 9.0} if kind == "lexicographic" else {}
    scorer = Scorer([Node("node", 1.0, kind, [leaf(marks), leaf(three_long)], args)])
    found = scorer.score([of_three("12a")], steps=[list("12a")])
    assert set(found.by_step) == {"marks"}


def test_a_guard_by_step_opens_by_its_sum():
    guarded = Node("guarded", 1.0, "gate", [leaf(marks), leaf(three_long)], {"above": 1.5})
    found = Scorer([guarded]).score([of_three("12a", "a1a")], steps=[list("12a"), list("a1a")])
    assert found.total == [[1, 0]]
    assert set(found.by_step) == {"marks"}


def test_a_node_without_a_value_or_without_steps_gives_none():
    node = Node("node", 1.0, "sum", [leaf(marks), leaf(size)])
    found = Scorer([node]).score([Group((1,), (Completion((3,), (True,), ""),))], steps=[[]])
    assert found.total == [[None]]
    assert found.by_step["node"] == [[]]
