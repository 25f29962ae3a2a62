"""Rows of a pair and a gold completion, in the column `reference`."""

from __future__ import annotations

import pytest
from conversations import CHATML, make, talk

from rlpost.data.codec import make_codec
from rlpost.data.encoding import _is_equal
from rlpost.data.formats import DataRole, Format, encode, recognise, row_texts
from rlpost.data.layouts import read_as
from rlpost.data.plain import Plain
from rlpost.errors import DataError

ROW = {"prompt": "1+2=", "chosen": "3", "rejected": "4", "reference": "33"}


@pytest.fixture(scope="module")
def chatml():
    return make_codec(make(CHATML))


def texts(codec, group):
    return [codec.tokenizer.decode(list(c.ids)) for c in group.completions]


def test_the_columns_tell_the_format():
    assert recognise([ROW], "main", DataRole.triples) is Format.triple
    assert recognise([ROW], "main", DataRole.pairs) is Format.pair
    renamed = {**ROW, "gold": "33"}
    del renamed["reference"]
    with pytest.raises(DataError, match=r"needed are \(chosen, rejected, reference\): .*columns: \{reference: gold\}"):
        recognise([renamed], "main", DataRole.triples)


def test_the_gold_one_is_third(codec):
    group = encode(ROW, Format.triple, codec, "row 1")
    assert [c.text for c in group.completions] == ["3", "4", "33"]
    assert len(encode(ROW, Format.pair, codec, "row 1").completions) == 2


def test_many_at_once_are_read_as_one_by_one(codec):
    rows = [ROW, {**ROW, "rejected": "3"}, {**ROW, "reference": "4"}, {**ROW, "reference": None}]
    plain = Plain(rows, Format.triple, codec, 20)
    assert plain.clean.tolist() == [True, False, True, False]
    assert plain._codes_RK.shape == (4, 4)


def test_a_pair_of_equal_completions_is_equal_whatever_the_gold_one(codec):
    assert _is_equal(encode({**ROW, "rejected": "3"}, Format.triple, codec, ""), Format.triple)
    assert not _is_equal(encode({**ROW, "reference": "3"}, Format.triple, codec, ""), Format.triple)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": talk("a", "b"), "rejected": talk("a", "c"), "reference": talk("a", "d")},
        {"prompt": talk("a"), "chosen": "b", "rejected": "c", "reference": "d"},
        {"prompt": "a", "chosen": talk("a", "b")[1:], "rejected": "c", "reference": talk("a", "d")[1:]},
    ],
)
def test_messages_and_whole_conversations(chatml, row):
    group = encode(row, Format.triple, chatml, "row 1")
    assert texts(chatml, group) == ["b<|im_end|>", "c<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize("gold", [talk("x", "d"), talk("a"), talk("a", "b", "c", "d")[:3] + talk("a", "d")[1:]])
def test_a_whole_conversation_of_another_prompt_is_refused(chatml, gold):
    """The last one is: it goes on from the same prompt, and may have turns of its own."""
    row = {"chosen": talk("a", "b"), "rejected": talk("a", "c"), "reference": gold}
    if len(gold) > 2:
        assert len(encode(row, Format.triple, chatml, "row 1").completions) == 3
        return
    with pytest.raises(DataError, match="row 1, reference: it is not an answer to the 1 messages"):
        encode(row, Format.triple, chatml, "row 1")


def test_a_missing_or_odd_gold_completion_is_refused(codec):
    with pytest.raises(DataError, match="row 1: 'reference' is null, not text or messages"):
        encode({**ROW, "reference": None}, Format.triple, codec, "row 1")
    with pytest.raises(DataError, match="row 1: margin is"):
        encode({**ROW, "margin": "x"}, Format.triple, codec, "row 1")
    with pytest.raises(DataError, match="'reference' is a text that is the JSON of messages"):
        read_as([{**ROW, "reference": '[{"role": "assistant", "content": "3"}]'}], "main", DataRole.triples)


def test_a_pair_says_that_it_leaves_the_gold_one_out():
    assert read_as([ROW], "main", DataRole.pairs).said == "prompt, chosen, rejected; its column 'reference' is not read"
    assert read_as([ROW], "main", DataRole.ranked).said.endswith("its column 'reference' is not read")
    assert read_as([ROW], "main", DataRole.triples).said == "prompt, chosen, rejected, reference"


def test_a_tokenizer_is_trained_on_it_beside_a_pair_alone():
    assert row_texts(ROW) == ["1+2=", "3", "4", "33"]
    assert row_texts({"prompt": "1+2=", "reference": "page 4"}) == ["1+2="]
