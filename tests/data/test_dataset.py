import json

import pytest
from conversations import THINKING, THOUGHT, make, without_markers

from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset, texts
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import Source, TooLong
from rlpost.errors import DataError, RecipeError
from rlpost.usercode.params import TimedFunction

ROWS = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i:02d}"} for i in range(10)]
"""Four characters and two, and the end token: 7 tokens each."""


def reverse(row, random):
    return {**row, "completion": "".join(random.choices("01", k=3))}


def bind(function, field, where, base):
    return {"reverse": reverse, "grow": grow, "fail": fail, "nothing": nothing}[function.fn]


def grow(row, random):
    return {**row, "completion": "1" * random.randint(1, 9)}


def fail(row, random):
    return row["x"]


def nothing(row, random):
    return None


def no_stage(name):
    raise AssertionError(name)


def build(sources, codec, need=DataRole.completions, seed=0, max_length=100, too_long=TooLong.refuse):
    return open_dataset(
        sources,
        codec,
        need=need,
        limit=Limit(max_length, too_long),
        seed=seed,
        where="stages.sft.data",
        stages=no_stage,
        bind=bind,
    )


@pytest.fixture
def one(write):
    return {"main": Source(path=str(write(ROWS)))}


def test_rows_are_encoded_and_each_drawn_once_an_epoch(one, codec):
    data = build(one, codec)
    assert (len(data), data.epoch_length) == (10, 10)
    groups = data.next(10)
    assert sorted(g.example["prompt"] for g in groups) == [r["prompt"] for r in ROWS]
    assert groups[0].completions[0].text == groups[0].example["completion"]
    assert [g.example for g in data.all()] == ROWS


def test_the_format_is_said_aloud(one, codec):
    (line,) = build(one, codec).notices
    assert line.startswith("stages.sft.data.main (")
    assert line.endswith("rows.jsonl): 10 rows, read as prompt, completion")


def digests(groups):
    return [group.digest() for group in groups]


@pytest.mark.parametrize("augment", [None, "reverse", "grow"])
@pytest.mark.parametrize("cut", [0, 3, 10, 17])
def test_resume_is_exact(write, codec, cut, augment):
    sources = {
        "a": Source(path=str(write(ROWS)), weight=2, augment=TimedFunction(fn=augment) if augment else None),
        "b": Source(path=str(write(ROWS[:3], "b.jsonl"))),
    }
    options = {"max_length": 10, "too_long": TooLong.drop}
    whole = build(sources, codec, **options).next(40)
    first = build(sources, codec, **options)
    assert digests(first.next(cut)) == digests(whole[:cut])
    second = build(sources, codec, **options)
    second.load(json.loads(json.dumps(first.state())))
    assert digests(second.next(40 - cut)) == digests(whole[cut:])


def test_changed_data_is_refused_unless_allowed(write, codec):
    state = build({"main": Source(path=str(write(ROWS)))}, codec).state()
    other = build({"main": Source(path=str(write([{**ROWS[0], "completion": "7"}, *ROWS[1:]])))}, codec)
    with pytest.raises(DataError, match="the data has changed"):
        other.load(state)
    other.load(state, allow_change=True)


def test_augmented_rows_are_made_anew_every_time(write, codec):
    data = build({"main": Source(path=str(write(ROWS[:1])), augment=TimedFunction(fn="reverse"))}, codec)
    drawn = [g.completions[0].text for g in data.next(30)]
    assert set(drawn) == {f"{i:03b}" for i in range(8)}
    assert digests(data.all()) == digests(data.all())


def test_augment_errors_are_one_line(write, codec):
    for name, reason in [
        ("fail", r"rows.jsonl:1\): augment failed with KeyError: 'x'"),
        ("nothing", "augment returned NoneType"),
    ]:
        with pytest.raises(DataError, match=reason):
            build({"main": Source(path=str(write(ROWS)), augment=TimedFunction(fn=name))}, codec)


LONG = [ROWS[0], {"prompt": "1+1=", "completion": "123456"}, {"prompt": "123456789", "completion": "1"}]
"""7, 4+7 and 9+2 tokens."""


def long(write):
    return {"main": Source(path=str(write(LONG)))}


def test_too_long_is_refused_by_naming_the_first_row(write, codec):
    with pytest.raises(DataError, match=r"rows.jsonl:2\) has 11 tokens, the limit is 8: raise max_length, or set"):
        build(long(write), codec, max_length=8)
    assert len(build(long(write), codec, max_length=11)) == 3


def test_too_long_is_dropped_and_counted(write, codec):
    data = build(long(write), codec, max_length=8, too_long=TooLong.drop)
    assert len(data) == 1
    assert data.notices[1] == "2 of 3 rows dropped: longer than 8 tokens"
    with pytest.raises(DataError, match="none of 3 rows fits 3 tokens"):
        build(long(write), codec, max_length=3, too_long=TooLong.drop)


def test_a_cut_completion_loses_its_end_and_a_prompt_is_never_cut(write, codec):
    data = build(long(write), codec, max_length=8, too_long=TooLong.cut)
    assert [(len(g.prompt), tuple(g.completions[0].ids), g.completions[0].text) for g in data.all()] == [
        (4, (4, 4, 2), "00"),
        (4, (5, 6, 7, 8), "1234"),
    ]
    assert data.notices[1:] == [
        "1 of 3 rows cut to 8 tokens; what was cut is not taught to stop there",
        "1 of 3 rows dropped: 8 tokens leave nothing of the completion to train",
    ]


def test_both_completions_of_a_pair_are_cut(write, codec):
    rows = [{"prompt": "1", "chosen": "12345", "rejected": "5"}]
    data = build({"main": Source(path=str(write(rows)))}, codec, DataRole.pairs, max_length=4, too_long=TooLong.cut)
    assert [tuple(c.ids) for c in data.all()[0].completions] == [(5, 6, 7), (9, 2)]


def test_prompts_are_limited_by_themselves(write, codec):
    with pytest.raises(DataError, match=r"rows.jsonl:3\) has a prompt of 9 tokens, the limit is 8"):
        build(long(write), codec, DataRole.prompts, max_length=8)
    data = build(long(write), codec, DataRole.prompts, max_length=8, too_long=TooLong.cut)
    assert [len(g.prompt) for g in data.all()] == [4, 4]
    assert data.all()[0].completions == ()


def test_rows_are_named_by_their_number(write, codec):
    path = write([*ROWS, {"prompt": "1"}])
    with pytest.raises(DataError, match=r"main \(.*rows\.jsonl:11\) has no 'completion'"):
        build({"main": Source(path=str(path))}, codec)


def test_no_source(codec):
    with pytest.raises(RecipeError, match=r"stages\.sft\.data names no source"):
        build({}, codec)


def test_turns_left_out_by_the_template_are_counted(write):
    codec = make_codec(make(without_markers(THINKING)))
    rows = [{"messages": THOUGHT}, {"messages": THOUGHT[:2]}]
    data = build({"main": Source(path=str(write(rows)))}, codec, max_length=1000)
    assert data.notices[1] == "1 of 2 rows leave earlier turns untrained: the chat template changes them"


def test_texts_for_a_tokenizer(write):
    rows = [
        {"prompt": "a", "completion": "b", "answer": "c"},
        {"messages": [{"role": "user", "content": "d"}]},
    ]
    options = {"where": "model.tokenizer.data", "stages": no_stage, "bind": bind}
    assert texts({"main": Source(path=str(write(rows)))}, **options) == ["a", "b", "d"]
    with pytest.raises(DataError, match="has the columns question"):
        texts({"main": Source(path=str(write([{"question": "a"}])))}, **options)
