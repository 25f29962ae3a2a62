"""Completions and groups: arrays that stay as they are, and comparisons that see everything."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from rlpost.types import Completion, Group

ARRAYS = {
    "ids": np.int32,
    "action": np.bool_,
    "logprobs": np.float64,
    "steps": np.int32,
    "step_labels": np.float64,
    "step_rewards": np.float64,
}
WHOLE = Completion(
    [9, 12, 4, 2],
    [True, False, True, True],
    "580",
    "stop",
    [-0.5, -1.0, -0.1],
    [2, 1],
    [1.0, 0.25],
    reward=0.5,
    label=True,
    score=2.0,
    weights_version=3,
    step_rewards=[0.5, 0.0],
    messages=[{"role": "assistant", "content": "580", "reward": 0.5}],
)
OTHERWISE: dict[str, Any] = {
    "ids": np.array([9, 12, 5, 2], np.int32),
    "action": np.array([True, True, False, True]),
    "text": "58",
    "finish": "length",
    "logprobs": np.array([-0.5, -1.0, -0.1 - 1e-16]),
    "steps": np.array([1, 2], np.int32),
    "step_labels": np.array([1.0, 0.5]),
    "reward": None,
    "label": False,
    "score": -2.0,
    "weights_version": 4,
    "step_rewards": np.array([0.0, 0.5]),
    "messages": ({"role": "assistant", "content": "580", "reward": 0.0},),
}


def test_arrays_have_their_types_and_cannot_be_written_to():
    for name, kind in ARRAYS.items():
        array = getattr(WHOLE, name)
        assert array.dtype == kind
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    group = Group([1, 2], [WHOLE])
    assert group.prompt.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        group.prompt[0] = 1


def test_an_array_is_not_changed_through_where_it_came_from():
    ids = np.array([1, 2, 3], np.int32)
    found = Completion(ids, [True] * 3), Group(ids, ())
    ids[0] = 7
    assert (found[0].ids[0], found[1].prompt[0]) == (1, 1)
    assert ids.flags.writeable
    again = replace(found[0], text="x")
    assert again.ids is not ids
    assert np.shares_memory(again.ids, found[0].ids)


def test_log_probabilities_keep_the_type_they_were_sampled_in():
    sampled = np.array([-0.1], np.float32)
    assert Completion([1], [True], logprobs=sampled).logprobs.dtype == np.float32
    assert Completion([1], [True], logprobs=sampled.astype(np.float64)).logprobs.dtype == np.float64
    assert Completion([1], [True], logprobs=[-0.1]).logprobs.tolist() == [-0.1]


def test_what_is_the_same_is_so_by_content():
    twin = replace(WHOLE)
    assert twin is not WHOLE
    assert WHOLE.same(twin)
    assert WHOLE.digest() == twin.digest()
    assert twin != WHOLE
    one, other = (Group([1], [c], {"a": 1, "b": 2}) for c in (WHOLE, twin))
    assert one.same(other)
    assert one.same(replace(other, example={"b": 2, "a": 1}))


def test_no_field_is_overlooked():
    assert set(OTHERWISE) == {field.name for field in fields(Completion)}
    for name, value in OTHERWISE.items():
        other = replace(WHOLE, **{name: value})
        assert not WHOLE.same(other), name
        assert not Group([1], [WHOLE]).same(Group([1], [other])), name
    group = Group([1], [WHOLE], {"a": 1})
    for other in (Group([2], [WHOLE], {"a": 1}), Group([1], [WHOLE, WHOLE], {"a": 1}), Group([1], [WHOLE], {"a": 2})):
        assert not group.same(other)


def test_tokens_do_not_move_between_fields_unseen():
    one = Group([1, 2], [Completion([3], [True])])
    assert not one.same(Group([1], [Completion([2, 3], [True, True])]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": [True]}, "4 tokens has 1 flags of action"),
        ({"logprobs": [-0.5]}, "3 actions has 1 log-probabilities"),
        ({"steps": [1, 1]}, r"3 actions has steps of \[1, 1\]"),
        ({"step_labels": [1.0]}, "2 steps has 1 labels of steps"),
        ({"step_rewards": [1.0]}, "2 steps has 1 rewards of steps"),
        ({"ids": [[1, 2], [3, 4]]}, "expected a row of numbers"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(WHOLE, **changes)


def test_a_prompt_has_a_token():
    with pytest.raises(ValueError, match="at least one token"):
        Group([], [])


def test_a_reward_is_given_to_a_completion_that_stays_as_it_is():
    one = Completion([3, 4], [True, True], "ab", "stop", logprobs=[-0.5, -1.0], weights_version=2)
    other = one.rewarded(0.25)
    assert (one.reward, other.reward) == (None, 0.25)
    assert other.rewarded(None).same(one)
    assert other.same(replace(one, reward=0.25))
