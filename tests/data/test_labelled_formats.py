"""Rows that carry a judgement: labels, scores, steps, and recorded rollouts."""

import pytest
from conversations import CHATML, make, talk

from rlpost.data.codec import make_codec
from rlpost.data.formats import DataRole, Format, encode, recognise, row_texts
from rlpost.errors import DataError


@pytest.mark.parametrize(
    ("columns", "need", "form"),
    [
        ("prompt completion label", DataRole.labelled, Format.labelled),
        ("prompt completions scores", DataRole.ranked, Format.ranked),
        ("prompt chosen rejected", DataRole.ranked, Format.ranked_pair),
        ("prompt steps labels", DataRole.steps, Format.steps),
        ("prompt example completions", DataRole.recorded, Format.recorded),
    ],
)
def test_the_columns_tell_the_format(columns, need, form):
    assert recognise([dict.fromkeys(columns.split(), "a")], "main", need) is form
    with pytest.raises(DataError, match="main has the columns text, needed are"):
        recognise([{"text": "a"}], "main", need)


def test_several_completions_share_their_prompt(codec):
    row = {"prompt": "1+2=", "completions": ["3", "4", "33"]}
    assert recognise([row], "main", DataRole.completions) is Format.several
    group = encode(row, Format.several, codec, "row 1")
    alone = [encode({"prompt": "1+2=", "completion": c}, Format.completion, codec, "row 1") for c in row["completions"]]
    assert tuple(group.prompt) == tuple(alone[0].prompt)
    assert all(c.same(g.completions[0]) for c, g in zip(group.completions, alone, strict=True))
    with pytest.raises(DataError, match="row 1: it has no completions"):
        encode({"prompt": "1+2=", "completions": []}, Format.several, codec, "row 1")


@pytest.mark.parametrize(("label", "meant"), [(True, True), ("false", False), (1, True), ("0", False)])
def test_a_label_is_a_boolean(codec, label, meant):
    row = {"prompt": "1+2=", "completion": "3", "label": label}
    group = encode(row, Format.labelled, codec, "row 1")
    assert [(c.text, c.label) for c in group.completions] == [("3", meant)]
    assert type(group.completions[0].label) is bool
    assert group.example == row


@pytest.mark.parametrize("label", [None, "perhaps", 0.5, 2])
def test_other_labels_are_refused(codec, label):
    with pytest.raises(DataError, match=r"row 1: 'label' is .*, neither true \(desirable\) nor false"):
        encode({"prompt": "1", "completion": "3", "label": label}, Format.labelled, codec, "row 1")


def test_a_ranking_has_a_score_for_each_completion(codec):
    row = {"prompt": "1+2=", "completions": ["3", "4", "5"], "scores": [1, None, 0.5]}
    group = encode(row, Format.ranked, codec, "row 1")
    assert [c.text for c in group.completions] == ["3", "4", "5"]
    assert [c.score for c in group.completions] == [1.0, None, 0.5]
    assert group.example == row
    pair = encode({"prompt": "1+2=", "chosen": "3", "rejected": "4"}, Format.ranked_pair, codec, "row 1")
    assert [c.score for c in pair.completions] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1], "row 1: 2 completions have 1 scores; give one for each"),
        ([1, 1], "row 1: a ranking needs two completions of different scores"),
        ([1, None], "row 1: a ranking needs two completions of different scores"),
        ([1, "b"], r"row 1: scores\[1\] is 'b', not a finite number"),
        ([1, float("inf")], r"row 1: scores\[1\] is inf, not a finite number"),
        ("12", "row 1: 'scores' is str, not a list"),
    ],
)
def test_rankings_that_rank_nothing_are_refused(codec, scores, message):
    with pytest.raises(DataError, match=message):
        encode({"prompt": "1", "completions": ["3", "4"], "scores": scores}, Format.ranked, codec, "row 1")


def test_conversations_can_be_ranked():
    chatml = make_codec(make(CHATML))
    row = {"prompt": talk("user: hi"), "completions": ["yes", "no"], "scores": [0, 1]}
    group = encode(row, Format.ranked, chatml, "row 1")
    for completion, text in zip(group.completions, ("yes", "no"), strict=True):
        assert text in chatml.tokenizer.decode(list(completion.ids))
        assert completion.actions > 0


def test_steps_are_tokenised_apart_and_end_nothing(codec):
    row = {"prompt": "1+2+3=", "steps": ["1+2=3\n", "3+3=6"], "labels": [1, 0.25]}
    (completion,) = encode(row, Format.steps, codec, "row 1").completions
    assert tuple(completion.steps) == (6, 5)
    assert codec.tokenizer.decode(list(completion.ids)) == "1+2=3\n3+3=6"
    assert completion.actions == len(completion.ids) == 11
    assert completion.ids[-1] != codec.end
    assert row_texts(row) == ["1+2+3=", "1+2=3\n", "3+3=6"]


@pytest.mark.parametrize(
    ("steps", "labels", "message"),
    [
        (["1"], [1, 1], "row 1: 1 steps have 2 labels"),
        ([], [], "row 1: 0 steps have 0 labels; give at least one step"),
        (["1", ""], [1, 1], r"row 1: steps\[1\] is '', not text"),
        (["1"], [-1], r"row 1: labels\[0\] is -1; a step is wrong \(0\) or right \(1\)"),
        (["1"], ["x"], r"row 1: labels\[0\] is 'x', not a finite number"),
    ],
)
def test_steps_that_do_not_fit_are_refused(codec, steps, labels, message):
    with pytest.raises(DataError, match=message):
        encode({"prompt": "1", "steps": steps, "labels": labels}, Format.steps, codec, "row 1")


def recorded(**changes):
    said = {"ids": [5, 6, 2], "action": [1, 0, 1], "logprobs": [-1, -0.5], "text": "12", "reward": 1, "finish": "stop"}
    return {"prompt": [4, 5], "example": {"answer": "1"}, "completions": [said | changes]}


def test_a_recorded_rollout_is_what_was_sampled(codec):
    group = encode(recorded(), Format.recorded, codec, "row 1")
    (completion,) = group.completions
    assert (tuple(group.prompt), tuple(completion.ids), tuple(completion.action)) == (
        (4, 5),
        (5, 6, 2),
        (True, False, True),
    )
    assert (tuple(completion.logprobs), completion.text, completion.finish) == ((-1.0, -0.5), "12", "stop")
    assert (completion.reward, group.example) == (1.0, {"answer": "1"})
    (unscored,) = encode(recorded(reward=None), Format.recorded, codec, "row 1").completions
    assert unscored.reward is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [5, 6, 999]}, "row 1, completions.0.: token 999 is not one of the tokenizer's 24"),
        ({"action": [1, 1, 1]}, "3 flags of action and 2 logprobs for 3 actions do not fit together"),
        ({"logprobs": [-1, None]}, "logprobs is None, not a finite number"),
    ],
)
def test_a_recorded_rollout_that_does_not_fit_is_refused(codec, changes, message):
    with pytest.raises(DataError, match=message):
        encode(recorded(**changes), Format.recorded, codec, "row 1")


def test_a_margin_is_a_number(codec):
    row = {"prompt": "1", "chosen": "3", "rejected": "4"}
    assert encode({**row, "margin": 2}, Format.pair, codec, "row 1").example["margin"] == 2
    with pytest.raises(DataError, match="row 1: margin is 'much', not a finite number"):
        encode({**row, "margin": "much"}, Format.pair, codec, "row 1")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ids": None}, "'ids' is NoneType, not a list"),
        ({"action": 1}, "'action' is int, not a list"),
        ({"logprobs": {}}, "'logprobs' is dict, not a list"),
        ({"ids": [True, 6, 2]}, "token True is not one"),
        ({"action": ["0", 1, 1]}, "action has '0'"),
        ({"text": 3}, "'text' is int, not text"),
    ],
)
def test_a_recorded_completion_of_other_types_is_refused(codec, changes, reason):
    row = recorded()
    row["completions"] = [{**row["completions"][0], **changes}]
    with pytest.raises(DataError, match=f"row 1, completions.0..*{reason}"):
        encode(row, Format.recorded, codec, "row 1")


def test_a_row_without_its_label_is_refused(codec):
    with pytest.raises(DataError, match="row 1 has no 'label'"):
        encode({"prompt": "1", "completion": "2"}, Format.labelled, codec, "row 1")
