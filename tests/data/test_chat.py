import random

import pytest
from conversations import CHATML, MISTRAL, STOPS, THINKING, THOUGHT, make, talk, without_markers
from tokenizers import AddedToken

from rlpost.data import chat
from rlpost.data.codec import make_codec
from rlpost.data.formats import Format, encode
from rlpost.data.messages import question
from rlpost.data.templates import Job, Talk, clock_at, render_all
from rlpost.errors import DataError, ModelError


def random_talk(generator, system):
    alphabet = "abc XYZ 019 .,!?\n\t é日🙂 <>|[]{}"

    def content():
        return "x" + "".join(generator.choices(alphabet, k=generator.randrange(12))) + "y"

    turns = talk(*(content() for _ in range(2 * generator.randint(1, 4))))
    return [{"role": "system", "content": content()}, *turns] if system and generator.random() < 0.5 else turns


def trained(tokenizer, group):
    """Decoded runs of trained tokens."""
    (completion,) = group.completions
    runs, run = [], []
    for i, action in zip((*completion.ids, 0), (*completion.action, False), strict=True):
        if action:
            run.append(i)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("name", STOPS)
def test_trained_text_is_the_assistants_turns_with_their_stop_token(name, markers):
    template, stop = STOPS[name]
    tokenizer = make(template if markers else without_markers(template))
    codec = make_codec(tokenizer)
    assert chat.probe(tokenizer).stop == stop
    lead = " " if name == "mistral" else ""  # which generation has to produce as well
    generator = random.Random(name)
    for number in range(200):
        messages = random_talk(generator, system=name != "mistral")
        group = encode({"messages": messages}, Format.messages, codec, f"row {number}")
        turns = [m["content"] for m in messages if m["role"] == "assistant"]
        assert trained(tokenizer, group) == [lead + turn + stop for turn in turns]
        first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
        generated_from = tokenizer.apply_chat_template(messages[:first], add_generation_prompt=True, return_dict=False)
        assert list(group.prompt) == generated_from
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert whole.startswith(tokenizer.decode([*group.prompt, *group.completions[0].ids]))


def test_what_stands_between_turns_is_context_and_nothing_follows_the_last_stop():
    tokenizer = make(CHATML)
    (completion,) = encode(
        {"messages": talk("a", "b", "c", "d", "e")}, Format.messages, make_codec(tokenizer), ""
    ).completions
    assert tokenizer.decode(list(completion.ids)) == (
        "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>"
    )
    assert completion.text == "d"
    assert completion.actions == 4
    assert tuple(completion.action[-2:]) == (True, True)


def test_tool_turns_are_context():
    messages = [
        *talk("a", "call"),
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42"},
    ]
    tokenizer = make(CHATML)
    group = encode({"messages": messages}, Format.messages, make_codec(tokenizer), "")
    assert trained(tokenizer, group) == ["call<|im_end|>", "It is 42<|im_end|>"]
    assert "tool\n42" in tokenizer.decode(list(group.completions[0].ids))


def test_of_a_template_that_changes_earlier_turns_those_that_are_whole_are_trained_by_its_markers():
    tokenizer = make(THINKING)
    messages = [*talk("x", "y"), *THOUGHT]
    group = encode({"messages": messages}, Format.messages, make_codec(tokenizer), "")
    assert trained(tokenizer, group) == ["y<|im_end|>", "<think>e</think>f<|im_end|>"]
    assert "assistant\nc<|im_end|>" in tokenizer.decode(list(group.completions[0].ids))


def test_markers_may_end_before_the_stop_token_and_must_begin_where_generation_does():
    messages = [*talk("x", "y"), *THOUGHT]
    early = THINKING.replace(
        "{{- text + '<|im_end|>' }}{% endgeneration %}", "{{- text }}{% endgeneration %}<|im_end|>"
    )
    late = THINKING.replace("{% generation %}", "{{- ' ' }}{% generation %}")
    assert THINKING not in (early, late)
    for template, expected in (
        (early, ["y<|im_end|>", "<think>e</think>f<|im_end|>"]),
        (late, [" <think>e</think>f<|im_end|>"]),
    ):
        tokenizer = make(template)
        group = encode({"messages": messages}, Format.messages, make_codec(tokenizer), "")
        assert trained(tokenizer, group) == expected


def test_the_stop_token_is_the_longest_that_stands_there():
    tokenizer = make(CHATML)
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in ("<|", "<|im_")], special_tokens=True)
    assert chat.probe(tokenizer).stop == "<|im_end|>"


def test_without_markers_it_trains_the_last_turn_alone():
    tokenizer = make(without_markers(THINKING))
    group = encode({"messages": THOUGHT}, Format.messages, make_codec(tokenizer), "")
    assert trained(tokenizer, group) == ["<think>e</think>f<|im_end|>"]
    assert list(group.prompt) == tokenizer.apply_chat_template(
        THOUGHT[:3], add_generation_prompt=True, return_dict=False
    )
    plain = encode({"messages": talk("a", "b", "c", "d")}, Format.messages, make_codec(tokenizer), "")
    assert trained(tokenizer, plain) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_that_drops_a_part_of_the_last_turn_is_refused():
    tokenizer = make(without_markers(THINKING).replace(" if loop.index0 < ns.last else m.content", ""))
    with pytest.raises(DataError, match=r"row 1.*leaves out a part of message 2.*model\.chat_template"):
        encode({"messages": THOUGHT[:2]}, Format.messages, make_codec(tokenizer), "row 1")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            CHATML.replace("{%- if add_generation_prompt %}", "{%- if false %}"),
            "ignores add_generation_prompt",
        ),
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"), "does not begin"),
        (CHATML.replace("m.content + '<|im_end|>' }}{% end", "m.content }}{% end"), "no special token"),
        (
            CHATML.replace("{{ m.content + '<|im_end|>' }}", "{{ '<|im_end|>' }}"),
            "content is not in its turn",
        ),
        ("{{ raise_exception('no chat') }}", "no chat"),
        ("{% if %}", "refuses it"),
    ],
)
def test_a_template_that_cannot_train_is_refused_with_the_remedy(template, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        make_codec(make(template))
    assert "set model.chat_template=FILE.jinja" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [CHATML, MISTRAL, THINKING, *(t for t, _ in STOPS.values())])
def test_what_is_rendered_is_what_transformers_renders(template):
    tokenizer = make(template)
    generator = random.Random(0)
    for _ in range(20):
        messages = random_talk(generator, system=template != MISTRAL)
        whole = Talk(messages)
        jobs = [Job(whole, n, generation) for n in range(1, len(messages) + 1) for generation in (False, True)]
        assert [r.text for r in render_all(tokenizer, jobs, "here")] == [
            tokenizer.apply_chat_template(messages[: j.length], tokenize=False, add_generation_prompt=j.generation)
            for j in jobs
        ]


def test_a_template_of_its_own_for_tools():
    tokenizer = make({"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML})
    talks = [Talk(talk("a", "b"), tools) for tools in (None, [{"name": "f", "parameters": {}}])]
    assert [r.text for r in render_all(tokenizer, [Job(t, 2) for t in talks], "here")] == [
        tokenizer.apply_chat_template(t.messages, tools=t.tools, tokenize=False) for t in talks
    ]


def test_a_template_that_asks_for_the_day_is_told_the_same_one_all_through_a_run():
    tokenizer = make("{{ strftime_now('%d %b %Y, %H:%M') }}" + CHATML)
    job = Job(Talk(talk("a", "b")), 2)
    (now,) = render_all(tokenizer, [job], "here")
    with clock_at(lambda: "2021-02-03T04:05"):
        (then,) = render_all(tokenizer, [job], "here")
    assert then.text.startswith("03 Feb 2021, 04:05<|im_start|>")
    assert not now.text.startswith("03 Feb")
    assert render_all(tokenizer, [job], "here")[0].text[:11] == now.text[:11]


def test_the_question_of_a_row():
    assert question({"prompt": talk("a", "b", "c", system="s")}) == "c"
    assert question({"messages": talk("a", "b")}) == "a"
    assert question({"prompt": "a"}) is None
    assert question({"prompt": [3], "messages": None}) is None


def test_no_chat_template():
    codec = make_codec(make(None))
    assert codec.stops == (2,)
    with pytest.raises(ModelError, match=r"has no chat template: set model\.chat_template=FILE\.jinja"):
        encode({"messages": talk("a", "b")}, Format.messages, codec, "row 1")


def test_stop_tokens_are_the_templates_and_the_end_token():
    tokenizer = make(CHATML)
    assert make_codec(tokenizer).stops == (2, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert make_codec(make(MISTRAL)).stops == (2,)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ("hello", "list of at least one"),
        (["hello"], "message 1 has no role"),
        ([{"content": "a"}], "message 1 has no role"),
        ([*talk("a"), {"role": "bot", "content": "b"}], "message 2: role 'bot' is none of system"),
        ([*talk("a"), {"role": "assistant"}], r"message 2 \(assistant\): its content is missing"),
        (
            [*talk("a"), {"role": "assistant", "content": " \n"}],
            r"message 2 \(assistant\): its content is empty",
        ),
        ([{"role": "user", "content": 3}], r"message 1 \(user\): its content is int"),
        (talk("a"), "no assistant turn"),
        ([{"role": "assistant", "content": "b"}], "no assistant turn after a prompt"),
        (talk("a", "b<|im_end|>c"), "message 2 holds the stop token"),
    ],
)
def test_malformed_conversations(messages, reason):
    with pytest.raises(DataError, match=f"^row 7.*{reason}"):
        encode({"messages": messages}, Format.messages, make_codec(make(CHATML)), "row 7")


def test_a_conversation_the_template_refuses_names_the_row():
    messages = [*talk("a", "b"), {"role": "assistant", "content": "c"}]
    with pytest.raises(DataError, match="row 7: the chat template refuses it: roles must alternate"):
        encode({"messages": messages}, Format.messages, make_codec(make(MISTRAL)), "row 7")
