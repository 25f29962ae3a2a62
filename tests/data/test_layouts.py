"""Layouts of well-known data sets train the same tokens as the formats they stand for, or are refused in one line."""

import json

import numpy as np
import pytest
from conversations import CHATML, make

from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import Source
from rlpost.errors import DataError, ModelError
from rlpost.usercode.params import TimedFunction

SFT, PAIRS, KTO, RANKED, PROMPTS = (
    DataRole.completions,
    DataRole.pairs,
    DataRole.labelled,
    DataRole.ranked,
    DataRole.prompts,
)


@pytest.fixture(scope="module")
def chatml():
    return make_codec(make(CHATML))


@pytest.fixture
def load(chatml, tmp_path):
    """Rows, or a file -> (what was said of them, their groups)."""

    def opened(rows, need=SFT, codec=chatml, **source):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        found = open_dataset(
            {"main": Source(path=str(path), **source)},
            codec,
            need=need,
            limit=Limit(1000),
            seed=0,
            where="data",
            stages=None,
            bind=None,
        )
        return found.notices[0].split("read as ")[1], found.all()

    return opened


def same(groups, others):
    """Whether groups have the same prompts, tokens, trained tokens, labels and scores."""
    assert len(groups) == len(others)
    for a, b in zip(groups, others, strict=True):
        assert np.array_equal(a.prompt, b.prompt)
        assert len(a.completions) == len(b.completions)
        for x, y in zip(a.completions, b.completions, strict=True):
            assert np.array_equal(x.ids, y.ids)
            assert np.array_equal(x.action, y.action)
            assert (x.label, x.score) == (y.label, y.score)
    return True


def user(text):
    return {"role": "user", "content": text}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def said(who, text, **more):
    return {"from": who, "value": text, **more}


ASKED = [said("human", "Hi"), said("gpt", "Hello")]
TALK = [user("Hi"), bot("Hello")]
HH = "\n\nHuman: Hi\n\nAssistant: {}"
CASES = [
    ("alpaca", SFT, {"instruction": "Hi", "output": "Hello"}, {"messages": TALK}),
    ("alpaca", SFT, {"instruction": "Add", "input": "1 2", "output": "3"}, {"messages": [user("Add\n1 2"), bot("3")]}),
    ("alpaca", SFT, {"instruction": "Hi", "input": None, "output": "Hello", "history": []}, {"messages": TALK}),
    (
        "alpaca",
        SFT,
        {"instruction": "b", "input": "", "output": "c", "system": "s", "history": [["Hi", "Hello"]]},
        {"messages": [system("s"), *TALK, user("b"), bot("c")]},
    ),
    (
        "alpaca",
        SFT,
        {"instruction": "Hi", "output": "Hello", "history": '[["a", "b"]]'},
        {"messages": [user("a"), bot("b"), *TALK]},
    ),
    ("alpaca", PROMPTS, {"instruction": "Hi", "output": "Hello", "system": ""}, {"messages": TALK}),
    (
        "alpaca",
        KTO,
        {"instruction": "Hi", "output": "Hello", "label": 0},
        {"prompt": TALK[:1], "completion": "Hello", "label": False},
    ),
    (
        "alpaca",
        PAIRS,
        {"instruction": "Hi", "input": "", "chosen": "a", "rejected": "b"},
        {"prompt": TALK[:1], "chosen": "a", "rejected": "b"},
    ),
    ("sharegpt", SFT, {"conversations": ASKED}, {"messages": TALK}),
    ("sharegpt", SFT, {"conversation": ASKED, "system": "s"}, {"messages": [system("s"), *TALK]}),
    (
        "sharegpt",
        SFT,
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "GPT", "content": "Hello"}]},
        {"messages": TALK},
    ),
    ("sharegpt", SFT, {"messages": ASKED}, {"messages": TALK}),
    ("sharegpt", SFT, {"messages": json.dumps(TALK)}, {"messages": TALK}),
    ("sharegpt", SFT, {"conversations": TALK}, {"messages": TALK}),
    (
        "sharegpt",
        SFT,
        {
            "conversations": [
                said("system", "s"),
                *ASKED,
                said("User", "b"),
                said("chatgpt", "c", weight=0),
                said("human", "d"),
                said("bing", "e"),
            ]
        },
        {"messages": [system("s"), *TALK, user("b"), bot("c", weight=0), user("d"), bot("e")]},
    ),
    ("sharegpt", PROMPTS, {"conversations": ASKED}, {"messages": TALK}),
    (
        "sharegpt",
        KTO,
        {"conversations": ASKED, "label": "good"},
        {"prompt": TALK[:1], "completion": "Hello", "label": True},
    ),
    ("sharegpt", KTO, {"messages": TALK, "label": False}, {"prompt": TALK[:1], "completion": "Hello", "label": False}),
    (
        "sharegpt",
        PAIRS,
        {"conversations": ASKED[:1], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        {"prompt": TALK[:1], "chosen": "a", "rejected": "b"},
    ),
    (
        "sharegpt",
        PAIRS,
        {"conversations": ASKED[:1], "chosen": "a", "rejected": "b"},
        {"prompt": TALK[:1], "chosen": "a", "rejected": "b"},
    ),
    (
        "sharegpt",
        PAIRS,
        {"chosen": ASKED, "rejected": [ASKED[0], said("gpt", "b")]},
        {"prompt": TALK[:1], "chosen": "Hello", "rejected": "b"},
    ),
    (
        "sharegpt",
        PAIRS,
        {"prompt": "Hi", "chosen": ASKED[1:], "rejected": [said("gpt", "b")]},
        {"prompt": TALK[:1], "chosen": "Hello", "rejected": "b"},
    ),
    (
        "hh-rlhf",
        PAIRS,
        {"chosen": HH.format("a"), "rejected": HH.format("b")},
        {"prompt": TALK[:1], "chosen": "a", "rejected": "b"},
    ),
    (
        "hh-rlhf",
        PAIRS,
        {"prompt": HH.format(""), "chosen": HH.format("a"), "rejected": HH.format("b")},
        {"prompt": TALK[:1], "chosen": "a", "rejected": "b"},
    ),
    (
        "hh-rlhf",
        RANKED,
        {"chosen": HH.format("a"), "rejected": HH.format("b")},
        {"prompt": TALK[:1], "chosen": "a", "rejected": "b"},
    ),
    (
        "scored answers",
        RANKED,
        {"prompt": "Hi", "completions": [{"text": "a", "score": 1}, {"text": "b", "score": 0.5, "model": "x"}]},
        {"prompt": "Hi", "completions": ["a", "b"], "scores": [1, 0.5]},
    ),
    (
        "scored answers",
        RANKED,
        {
            "instruction": "Hi",
            "completions": [
                {"response": "a", "overall_score": 1},
                {"response": "b", "overall_score": None},
                {"response": "c", "overall_score": 3},
            ],
        },
        {"prompt": TALK[:1], "completions": ["a", "b", "c"], "scores": [1, None, 3]},
    ),
]


@pytest.mark.parametrize(("name", "need", "row", "canonical"), CASES)
def test_a_layout_is_said_and_trains_what_its_format_trains(name, need, row, canonical, load):
    read, groups = load([row], need)
    assert read.startswith(f"{name} (")
    assert set(read[len(name) + 2 : -1].split(", ")) <= set(row)
    _, others = load([canonical], need)
    assert same(groups, others)


GOOD = {"conversations": ASKED}
ALPACA = {"instruction": "a", "output": "b"}
PAIR = {"chosen": HH.format("a"), "rejected": HH.format("b")}
REFUSED = [
    (SFT, {"conversations": ASKED[1:]}, "the first turn is the assistant's"),
    (SFT, {"conversations": [system("s"), *ASKED[1:]]}, "the first turn is the assistant's"),
    (SFT, {"conversations": [*ASKED, ASKED[1]]}, "message 3 is a second turn of the assistant in a row"),
    (SFT, {"conversations": [ASKED[0], *ASKED]}, "message 2 is a second turn of the user in a row"),
    (SFT, {"conversations": ASKED[:1]}, "no assistant turn"),
    (SFT, {"conversations": []}, "is list, not a list of turns"),
    (SFT, {"conversations": None}, "is null, not a list of turns"),
    (SFT, {"conversations": "[{"}, "is not JSON"),
    (SFT, {"conversations": ["Hi"]}, "message 1 is str, not a turn"),
    (SFT, {"conversations": [said("hum\u0430n", "Hi"), ASKED[1]]}, "'from' is 'hum\u0430n', none of human, user"),
    (SFT, {"conversations": [{**ASKED[0], "role": "user"}, ASKED[1]]}, "message 1 has both from and role"),
    (SFT, {"conversations": [{"value": "Hi"}, ASKED[1]]}, "message 1 has neither from nor role"),
    (SFT, {"conversations": [{"from": "human"}, ASKED[1]]}, "message 1 has neither value nor content"),
    (SFT, {"conversations": [said("human", 3), ASKED[1]]}, "its content is int, not text"),
    (SFT, {"conversations": [ASKED[0], said("gpt", " ")]}, "its content is empty"),
    (SFT, {"conversations": [system("t"), *ASKED], "system": "s"}, "'system' and the conversation each have"),
    (SFT, {"conversations": ASKED, "system": ["s"]}, "'system' is list, not text"),
    (SFT, {"conversations": ASKED, "system": "s", "system_prompt": "t"}, "'system' and 'system_prompt' each have"),
    (SFT, {"conversations": [ASKED[0], said("function_call", "f(x)")]}, "its function_call is not JSON"),
    (SFT, {"conversations": [ASKED[0], said("function_call", "[]")]}, "its function_call is no {name, arguments}"),
    (SFT, {**ALPACA, "history": "x"}, "history[0] is 'x', not a pair"),
    (SFT, {**ALPACA, "history": [["a"]]}, "history[0] is ['a'], not a pair"),
    (SFT, {**ALPACA, "input": 3}, "'input' is 3, not text"),
    (SFT, {**ALPACA, "input": float("nan")}, "'input' is nan, not text"),
    (SFT, {**ALPACA, "instruction": ""}, "'instruction' is empty"),
    (SFT, {**ALPACA, "output": ""}, "'output' is empty"),
    (SFT, {**ALPACA, "output": None}, "'output' is None, not text"),
    (SFT, {"instruction": "a"}, "has no 'output' (columns: instruction)"),
    (PAIRS, {"conversations": ASKED, "chosen": "a", "rejected": "b"}, "it ends with an answer"),
    (KTO, {"conversations": ASKED[:1], "label": 1}, "it does not end with the answer that is labelled"),
    (KTO, {"conversations": ASKED, "label": 2}, "'label' is 2, neither true"),
    (PAIRS, {"chosen": PAIR["chosen"], "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "no turn in common"),
    (PAIRS, {**PAIR, "rejected": PAIR["chosen"] + "\n\nHuman: c\n\nAssistant: d"}, "only the beginning"),
    (PAIRS, {"chosen": PAIR["chosen"], "rejected": HH.format("")}, "does not end with an answer"),
    (PAIRS, {"chosen": PAIR["chosen"], "rejected": "b"}, "does not begin with 'Human:'"),
    (PAIRS, {"chosen": PAIR["chosen"], "rejected": None}, "does not begin with 'Human:'"),
    (PAIRS, {**PAIR, "prompt": "\n\nHuman: Ho\n\nAssistant:"}, "'prompt' is not what the dialogues begin with"),
    (PAIRS, {**PAIR, "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c"}, "a second turn of the user"),
]  # fmt: skip
FIRST = {SFT: GOOD, PAIRS: PAIR, KTO: {**GOOD, "label": 1}}


@pytest.mark.parametrize(("need", "row", "reason"), REFUSED)
def test_a_row_that_breaks_the_layout_is_refused_by_its_line(need, row, reason, load):
    first = ALPACA if "instruction" in row else FIRST[need]
    if need is PAIRS and "conversations" in row:
        first = {**row, "conversations": ASKED[:1]}
    with pytest.raises(DataError) as caught:
        load([first, row], need)
    assert "rows.jsonl:2" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("need", "row", "said", "choice", "read"),
    [
        (SFT, {**ALPACA, "text": "a b"}, "text and as alpaca (instruction, output)", "text", "text"),
        (SFT, {**ALPACA, "text": "a b"}, "{instruction: instruction}", "instruction", "alpaca"),
        (SFT, {**ALPACA, "conversations": ASKED}, "and as sharegpt (conversations)", "conversations", "sharegpt"),
        (SFT, {"messages": TALK, "conversations": ASKED}, "messages and as sharegpt", "messages", "messages"),
        (
            SFT,
            {"messages": ASKED, "conversations": ASKED},
            "sharegpt (messages) and",
            "messages",
            "sharegpt (messages)",
        ),
        (SFT, {"prompt": "a", "completion": "b", **ALPACA}, "prompt, completion and", "instruction", "alpaca"),
        (SFT, {"prompt": "a", "completion": "b", **ALPACA}, "{completion: completion}", "completion", "prompt, comp"),
        (PROMPTS, {"prompt": "a", **ALPACA}, "prompt and as alpaca", "prompt", "prompt"),
    ],
)
def test_where_two_fit_nothing_is_guessed_and_columns_choose(need, row, said, choice, read, load):
    with pytest.raises(DataError, match="can be read as") as caught:
        load([row], need)
    assert said in str(caught.value)
    assert f"{{{choice}: {choice}}}" in str(caught.value)
    assert load([row], need, columns={choice: choice})[0].startswith(read)


def test_formats_that_fit_as_they_are_stay_as_they_are(load):
    pair = {"chosen": TALK, "rejected": [TALK[0], bot("b")], "instruction": "Hi"}
    assert load([pair], PAIRS)[0] == "prompt, chosen, rejected"
    assert load([{"prompt": "a", "chosen": "b", "rejected": "c", "instruction": "x"}], PAIRS)[0].startswith(
        "prompt, ch"
    )
    assert (
        load([{"messages": TALK, "prompt": "a", "completion": "b", "label": 1}], KTO)[0] == "prompt, completion, label"
    )


def test_malformed_rows_are_dropped_and_counted_where_that_is_wished(load, chatml, tmp_path):
    rows = [GOOD, {"conversations": ASKED[1:]}, GOOD, {"conversations": [ASKED[0], said("gpt", " ")]}, GOOD]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def opened(**source):
        options = {"need": SFT, "limit": Limit(1000), "seed": 0, "where": "data", "stages": None, "bind": None}
        return open_dataset({"main": Source(path=str(path), **source)}, chatml, **options)

    with pytest.raises(DataError, match=r"bad.jsonl:2.*malformed=drop leaves such rows out"):
        opened()
    kept = opened(malformed="drop")
    assert same(kept.all(), load([GOOD] * 3)[1])
    assert [part.flat.number(i) for part in kept._parts for i in range(3)] == [1, 3, 5]
    (notice,) = [line for line in kept.notices if "they break" in line]
    assert notice.startswith("2 of 5 rows dropped: they break their format (first: data.main (")
    assert notice.endswith(
        "bad.jsonl:2), conversations: the first turn is the assistant's, not the user's: take it out)"
    )
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match="none of 1 rows is left: 1 dropped: they break their format"):
        opened(malformed="drop")
    path.write_text(
        json.dumps({"prompt": 3, "completion": "a"}) + "\n" + json.dumps({"prompt": "a", "completion": "b"})
    )
    assert len(opened(malformed="drop")) == 1


def test_columns_that_a_map_made_are_meant(tmp_path):
    from rlpost.data.layouts import read_as

    row = {**ALPACA, "prompt": "a", "completion": "b"}
    assert read_as([row], "main", SFT, made=True).said == "prompt, completion"
    assert read_as([{**GOOD, "messages": TALK}], "main", SFT, made=True).said == "messages"
    assert read_as([ALPACA], "main", SFT, made=True).said == "alpaca (instruction, output)"
    with pytest.raises(DataError, match="can be read as text and as alpaca"):
        read_as([{**ALPACA, "text": "a"}], "main", SFT, made=True)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for made in ({"map": "f"}, {"augment": "f"}, {}):
        source = Source(path="rows.jsonl", **{key: TimedFunction(fn=value) for key, value in made.items()})
        assert source.is_made is bool(made)


def test_equal_dialogues_are_left_out_and_counted(load):
    same_row = {"chosen": PAIR["chosen"], "rejected": PAIR["chosen"]}
    assert len(load([PAIR, same_row], PAIRS)[1]) == 1


def test_calls_of_functions_are_tool_calls(load):
    renders = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    codec = make_codec(
        make(CHATML.replace("{{ m.content + '<|im_end|>' }}", f"{{{{ m.content }}}}{renders}<|im_end|>"))
    )
    function = {"name": "f", "arguments": {"x": 1}}
    call = said("function_call", json.dumps(function))
    row = {"conversations": [ASKED[0], call, said("observation", "2"), said("gpt", "two")]}
    called = bot("", tool_calls=[{"type": "function", "function": function}])
    messages = [user("Hi"), called, {"role": "tool", "content": "2"}, bot("two")]
    assert same(load([row], codec=codec)[1], load([{"messages": messages}], codec=codec)[1])
    with pytest.raises(DataError, match=r"leaves out .*tool_calls"):  # by a template that renders none
        load([row])


def test_without_a_chat_template_alpaca_is_refused_with_the_columns_of_plain_text(load, codec):
    row = {"instruction": "1+2=", "input": "", "output": "3"}
    with pytest.raises(ModelError, match="read as conversations") as caught:
        load([row], codec=codec)
    assert r'columns: {prompt: "{instruction}\n{input}\n", completion: output}' in str(caught.value)
    columns = {"prompt": "{instruction}\n{input}\n", "completion": "output"}
    read, groups = load([row], codec=codec, columns=columns)
    assert read == "prompt, completion"
    assert same(groups, load([{"prompt": "1+2=\n\n", "completion": "3"}], codec=codec)[1])


def test_a_system_column_beside_a_plain_prompt_is_refused_unless_the_prompt_has_it(load):
    row = {"prompt": "a", "completion": "b", "system": "s"}
    with pytest.raises(DataError, match=r"rows.jsonl:1\).*its column 'system' is not read"):
        load([row])
    columns = {"prompt": "{system} {prompt}"}
    assert same(load([row], columns=columns)[1], load([{"prompt": "s a", "completion": "b"}])[1])
    by_alpaca = load([row], columns={"instruction": "prompt", "output": "completion"})
    assert by_alpaca[0] == "alpaca (system, instruction, output)"
    assert same(by_alpaca[1], load([{"messages": [system("s"), user("a"), bot("b")]}])[1])


def test_messages_as_json_in_a_column_of_texts_are_no_text(load):
    row = {"prompt": json.dumps(TALK[:1]), "completion": "Hello"}
    with pytest.raises(DataError, match="'prompt' is a text that is the JSON of messages"):
        load([row])
    assert load([{**row, "prompt": "[1] is [{role}]"}])[0] == "prompt, completion"


def test_rows_made_by_augment_have_a_layout_too_and_kept_rows_are_read_again(chatml, tmp_path):
    """The first time and from the shelf."""
    from rlpost.run.shelf import Shelf
    from rlpost.usercode.binding import bind

    (tmp_path / "own.py").write_text(
        "def made(row, random):\n    return {'instruction': row['q'], 'output': row['a'] + str(random.randrange(10))}\n"
    )
    (tmp_path / "augmented.jsonl").write_text('{"q": "Hi", "a": "Hello"}\n')
    (tmp_path / "plain.jsonl").write_text('{"instruction": "Hi", "output": "Hello", "answer": 5}\n')
    shelf = Shelf(tmp_path)
    sources = {
        "a": Source(path="augmented.jsonl", augment=TimedFunction(fn="own.py:made")),
        "b": Source(path="plain.jsonl"),
    }
    seen = []
    for kept in (None, shelf, shelf):
        found = open_dataset(
            sources,
            chatml,
            need=SFT,
            limit=Limit(100),
            seed=0,
            where="data",
            stages=None,
            bind=bind,
            base=tmp_path,
            shelf=kept,
        )
        groups = found.all()
        assert [n.split("read as ")[1] for n in found.notices] == [
            "alpaca (instruction, output)",
            "alpaca (instruction, output)",
        ]
        assert groups[1].example["answer"] == 5
        assert groups[1].example["messages"] == TALK
        assert groups[0].completions[0].text[:-1] == "Hello"
        seen.append(groups)
    assert same(seen[0], seen[1])
    assert same(seen[1], seen[2])
