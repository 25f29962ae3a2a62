import pytest
from conversations import CHATML, make, talk

from rlpost.data import encoders
from rlpost.data.codec import Codec, make_codec
from rlpost.data.formats import DataRole, Format, encode, recognise
from rlpost.errors import DataError


@pytest.fixture(scope="module")
def chatml():
    return make_codec(make(CHATML))


@pytest.mark.parametrize(
    ("columns", "need", "form"),
    [
        ("prompt completion answer", None, Format.completion),
        ("prompt chosen rejected", None, Format.pair),
        ("chosen rejected", DataRole.pairs, Format.pair),
        ("messages", None, Format.messages),
        ("text", DataRole.completions, Format.text),
        ("prompt answer", None, Format.prompt),
        ("prompt completion", DataRole.prompts, Format.prompt),
        ("messages", DataRole.prompts, Format.opening),
        ("prompt chosen rejected messages", DataRole.completions, Format.messages),
    ],
)
def test_the_columns_tell_the_format(columns, need, form):
    assert recognise([dict.fromkeys(columns.split(), "a")], "main", need) is form


def test_columns_that_fit_nothing_are_told_with_the_remedy():
    with pytest.raises(DataError, match=r"main has the columns question, answer, needed are \(prompt, completion\)"):
        recognise([{"question": "a", "answer": "b"}], "main", DataRole.completions)
    with pytest.raises(DataError, match=r"columns: \{prompt: COLUMN, chosen: COLUMN, rejected: COLUMN\}"):
        recognise([{"prompt": "a", "completion": "b"}], "main", DataRole.pairs)


@pytest.mark.parametrize(
    ("columns", "need", "mapping"),
    [
        ("question answer", DataRole.completions, "{prompt: question, completion: answer}"),
        ("prompt response", DataRole.completions, "{completion: response}"),
        ("question answer solution", DataRole.completions, "{prompt: COLUMN, completion: COLUMN}"),
        (
            "query accepted response_rejected",
            DataRole.pairs,
            "{prompt: query, chosen: accepted, rejected: response_rejected}",
        ),
        ("prompt completion kto_tag", DataRole.labelled, "{label: kto_tag}"),
        ("prompt responses rewards", DataRole.ranked, "{completions: responses, scores: rewards}"),
    ],
)
def test_the_mapping_is_exact_where_each_role_has_one_candidate(columns, need, mapping):
    row = dict.fromkeys(columns.split(), "a")
    with pytest.raises(DataError) as caught:
        recognise([row], "main", need)
    assert str(caught.value).endswith(f"name them with columns: {mapping}")


def test_prompt_and_completion(codec):
    row = {"prompt": "1+2=", "completion": "3", "answer": "3"}
    group = encode(row, Format.completion, codec, "row 1")
    assert tuple(group.prompt) == (5, 14, 6, 15)
    (completion,) = group.completions
    assert (tuple(completion.ids), tuple(completion.action), completion.text) == ((7, 2), (True, True), "3")
    assert group.example == row


def test_an_end_token_already_there_is_not_doubled_and_one_inside_is_refused(codec):
    group = encode({"prompt": "1", "completion": "2<eos>"}, Format.completion, codec, "row 1")
    assert (tuple(group.completions[0].ids), group.completions[0].text) == ((6, 2), "2")
    with pytest.raises(DataError, match="row 1: the end token stands inside"):
        encode({"prompt": "1", "completion": "2<eos>3"}, Format.completion, codec, "row 1")


def test_prompt_alone(codec):
    group = encode({"prompt": "1", "answer": "4"}, Format.prompt, codec, "row 1")
    assert (tuple(group.prompt), group.completions, group.example["answer"]) == ((5,), (), "4")


def test_a_pair_is_chosen_first(codec):
    group = encode({"prompt": "1", "chosen": "2", "rejected": "3"}, Format.pair, codec, "row 1")
    assert [tuple(c.ids) for c in group.completions] == [(6, 2), (7, 2)]


def test_text_begins_with_the_begin_token_or_its_own_first(codec):
    group = encode({"text": "123"}, Format.text, codec, "row 1")
    assert (tuple(group.prompt), tuple(group.completions[0].ids)) == ((1,), (5, 6, 7, 2))
    group = encode({"text": "<bos>12"}, Format.text, codec, "row 1")
    assert (tuple(group.prompt), tuple(group.completions[0].ids)) == ((1,), (5, 6, 2))


def test_without_a_begin_token_the_first_token_is_the_prompt():
    tokenizer = make(None)
    tokenizer.bos_token = None
    ids = tuple(tokenizer.encode("ab"))
    group = encode({"text": "ab"}, Format.text, make_codec(tokenizer), "row 1")
    assert (tuple(group.prompt), tuple(group.completions[0].ids)) == (ids[:1], (*ids[1:], 2))
    with pytest.raises(DataError, match="no begin token"):
        encode({"prompt": ""}, Format.prompt, make_codec(tokenizer), "row 1")


def test_a_begin_token_the_tokenizer_adds_comes_first_once(digits):
    codec = Codec(digits, begin=(1,), end=2, template=None)
    for prompt in ("1", "<bos>1"):
        assert tuple(encode({"prompt": prompt}, Format.prompt, codec, "row 1").prompt) == (1, 5)
    assert tuple(encode({"prompt": ""}, Format.prompt, codec, "row 1").prompt) == (1,)


def test_an_empty_prompt_is_the_begin_token(codec):
    assert tuple(encode({"prompt": ""}, Format.prompt, codec, "row 1").prompt) == (1,)


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        ({"prompt": "1"}, Format.completion, r"has no 'completion' \(columns: prompt\)"),
        ({"prompt": "1", "completion": None}, Format.completion, "'completion' is null"),
        (
            {"prompt": "1", "completion": 72},
            Format.completion,
            r"'completion' is int \(72\), not text.*\{completion\}",
        ),
        ({"prompt": "1", "completion": ""}, Format.completion, "'completion' is empty"),
        ({"prompt": {"a": 1}}, Format.prompt, "'prompt' is dict"),
        ({"text": ["a"]}, Format.text, "'text' must be text"),
        ({"chosen": "1", "rejected": "2"}, Format.pair, "has no 'prompt'"),
        ({"prompt": "é"}, Format.prompt, "no token for 'é'"),
    ],
)
def test_malformed_rows_are_named(codec, row, form, reason):
    with pytest.raises(DataError, match=f"^rows.jsonl row 17.*{reason}"):
        encode(row, form, codec, "rows.jsonl row 17")


def decoded(codec, group):
    return codec.tokenizer.decode(list(group.prompt)), [codec.tokenizer.decode(list(c.ids)) for c in group.completions]


ASKED = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": talk("a"), "completion": "b"}, Format.completion),
        ({"prompt": talk("a"), "completion": talk("a", "b")[1:]}, Format.completion),
        ({"prompt": "a", "completion": talk("a", "b")[1:]}, Format.completion),
    ],
)
def test_messages_and_text_mix(chatml, row, form):
    assert decoded(chatml, encode(row, form, chatml, "")) == (ASKED, ["b<|im_end|>"])


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": talk("a", "b"), "rejected": talk("a", "c")},
        {"prompt": "a", "chosen": talk("a", "b"), "rejected": talk("a", "c")},
        {"prompt": "a", "chosen": talk("a", "b")[1:], "rejected": talk("a", "c")[1:]},
        {"prompt": talk("a"), "chosen": "b", "rejected": "c"},
    ],
)
def test_pairs_of_messages_share_their_prompt(chatml, row):
    assert decoded(chatml, encode(row, Format.pair, chatml, "")) == (ASKED, ["b<|im_end|>", "c<|im_end|>"])


def test_an_implicit_prompt_is_all_that_two_conversations_share(chatml):
    row = {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "b", "c", "e")}
    prompt, ends = decoded(chatml, encode(row, Format.pair, chatml, ""))
    assert prompt.endswith("b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert ends == ["d<|im_end|>", "e<|im_end|>"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (talk("a", "b"), talk("a", "b"), "no difference"),
        (talk("a", "b"), talk("x", "b"), "nothing in common"),
        (talk("a", "b", "c", "d"), talk("a", "b", "x", "d"), "first differ in message 3"),
    ],
)
def test_pairs_without_an_implicit_prompt(chatml, chosen, rejected, reason):
    with pytest.raises(DataError, match=f"row 1: .*{reason}"):
        encode({"chosen": chosen, "rejected": rejected}, Format.pair, chatml, "row 1")


def test_prompts_from_conversations(chatml):
    for row, form in [
        ({"prompt": talk("a")}, Format.prompt),
        ({"messages": talk("a", "b")}, Format.opening),
        ({"messages": talk("a")}, Format.opening),
    ]:
        assert decoded(chatml, encode(row, form, chatml, "")) == (ASKED, [])
    with pytest.raises(DataError, match="ends with an assistant turn"):
        encode({"prompt": talk("a", "b")}, Format.prompt, chatml, "")


def test_turns_of_others_inside_a_completion_are_no_actions(chatml):
    messages = talk("a", "b", "c", "d")
    (completion,) = encode({"messages": messages}, Format.messages, chatml, "row 1").completions
    acted = [i for i, a in zip(completion.ids, completion.action, strict=True) if a]
    read = [i for i, a in zip(completion.ids, completion.action, strict=True) if not a]
    assert chatml.tokenizer.decode(acted) == "b<|im_end|>d<|im_end|>"
    assert "c<|im_end|>" in chatml.tokenizer.decode(read)


def test_a_pair_whose_prompts_are_rendered_unlike_is_refused(chatml, monkeypatch):
    honest = encoders.conversation

    def unlike(row, messages, first, codec, place):
        prompt, completion = honest(row, messages, first, codec, place)
        return (*prompt, 1) if "rejected" in place else prompt, completion

    row = {"prompt": talk("a"), "chosen": "b", "rejected": "c"}
    encode(row, Format.pair, chatml, "row 1")
    monkeypatch.setattr(encoders, "conversation", unlike)
    with pytest.raises(DataError, match="gives chosen and rejected different prompts"):
        encode(row, Format.pair, chatml, "row 1")
