"""The form of tool calls in chat templates: found, proved, and read in what a model may write."""

import json

import pytest
from tool_templates import (
    DEEPSEEK,
    LLAMA3,
    MISTRAL_3,
    MISTRAL_11,
    QWEN2_5,
    QWEN3,
    TEMPLATES,
    XML,
    XML_RESPONSES,
    with_tools,
)

from rlpost.data import tool_format as formats
from rlpost.data.chat import probe
from rlpost.data.templates import Job, Talk, render_all
from rlpost.data.tool_calls import Arguments, formed
from rlpost.data.tool_format import call_id, tool_format, wire_calls
from rlpost.data.tool_text import BadCall, ToolCall
from rlpost.data.visible import visible
from rlpost.errors import ModelError

HARD = {"text": '"{it}"\'s [1]\n\\n — žluť 漢字 🙂 </tool_call', "inner": {"a": [{}, [None, True, 1.5e-7]]}, "count": 0}


def form(template, tools=(), **attributes):
    tokenizer = with_tools(template)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer, tool_format(tokenizer, probe(tokenizer), list(tools))


def generated(tokenizer, calls, content=""):
    """The turn as the model would write it, with these calls."""
    turn = {"role": "assistant", "content": content, "tool_calls": wire_calls(calls)}
    talk = Talk([{"role": "user", "content": "q"}, turn], None)
    kind = Arguments.text if "```json" in tokenizer.chat_template else Arguments.object
    talk = formed(talk, kind)
    start, whole = (r.text for r in render_all(tokenizer, [Job(talk, 1, True), Job(talk, 2)], "test"))
    stop = probe(tokenizer)
    text = whole[len(start) : whole.rindex(stop.stop)]
    return visible(tokenizer.encode(text, add_special_tokens=False), tokenizer, {stop.stop_id})


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_calls_are_read_back(name):
    tokenizer, found = form(TEMPLATES[name])
    one, two = ToolCall("look_up", HARD), ToolCall("second", {})
    assert found.read(generated(tokenizer, [one])).calls == (one,)
    if name != "llama3":
        assert found.read(generated(tokenizer, [one, two, one])).calls == (one, two, one)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_without_calls_is_text(name):
    _, found = form(TEMPLATES[name])
    for text in ("It is 85.", "", "a set {1, 2} and [3]", "It is 85.\n"):
        assert found.read(text) == formats.Turn(text.strip())


def test_words_beside_calls_are_the_content():
    tokenizer, found = form(QWEN2_5)
    call = ToolCall("f", {"x": 1})
    assert found.read(generated(tokenizer, [call, call], "Let me see.")) == formats.Turn("Let me see.", (call, call))
    text = (
        '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call> and\n<tool_call>\n{"arguments":{"x":1},"name":"f"}'
    )
    assert found.read(text) == formats.Turn("and", (call, call))  # a stop string may cut off the end


def test_calls_in_reasoning_are_none():
    _, found = form(QWEN3)
    thought = '<think>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n</think>\n\n'
    assert found.read(thought + "Done.").calls == ()
    call = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert found.read(thought + call).calls == (ToolCall("g", {}),)


BAD = {
    "<tool_call>\n{'name': 'f'}\n</tool_call>": "it is not JSON: Expecting property name enclosed in double quotes",
    '<tool_call>\n{"name": "f", "arguments": {}\n</tool_call>': "it is not JSON: Expecting ',' delimiter",
    "<tool_call>": "it is not JSON: Expecting value at character 0",
    '<tool_call>\n{"name": "f"}\n</tool_call>': "it has no 'arguments', arguments",
    '<tool_call>\n{"arguments": {}}\n</tool_call>': "it has no 'name', a name",
    '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>': "its name is no text",
    '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>': "its arguments are no object",
    '<tool_call>\n{"name": "f", "arguments": "x"}\n</tool_call>': "it is not JSON: Expecting value",
    '<tool_call>\n["name"]\n</tool_call>': "it has no 'name', a name",
    '<tool_call>\n{"name": "f", "arguments": {"x": NaN}}\n</tool_call>': "it is not JSON: NaN is not JSON",
    f'<tool_call>\n{{"name": "f", "arguments": {{"x": {"9" * 5000}}}}}\n</tool_call>': "it is not JSON: Exceeds the",
    f"<tool_call>\n{'[' * 100_000}\n</tool_call>": "its JSON is nested too deeply",
    '<tool_call>\n{"name": "f", "arguments": {}} so\n</tool_call>': "it is followed by 'so",
}


@pytest.mark.parametrize("text", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_malformed_call_says_what_is_wrong_and_others_are_read(text):
    _, found = form(QWEN2_5)
    (bad,) = found.read(text).calls
    assert isinstance(bad, BadCall)
    assert bad.reason.startswith(BAD[text])
    good = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    first, second, third = found.read(f"{good}\n{text}\n{good}").calls
    assert (first, third) == (ToolCall("f", {}), ToolCall("f", {}))
    assert isinstance(second, BadCall)


def test_bare_calls_are_whole_turns():
    _, found = form(LLAMA3)
    assert found.read(' {"name": "f", "parameters": {"x": 1}}\n').calls == (ToolCall("f", {"x": 1}),)
    assert found.read('I call {"name": "f", "parameters": {}}').calls == ()
    assert found.read('{"answer": 3}').calls == ()
    (two,) = found.read('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}').calls
    assert two.reason == "a call is a whole turn, and nothing follows it"
    (broken,) = found.read('{"name": "f", "parameters": {}').calls
    assert broken.reason.startswith("it is not JSON")


def test_lists_and_names_before_arguments():
    _, found = form(MISTRAL_3)
    assert found.read('[TOOL_CALLS][{"name": "f", "arguments": {}}]').calls == (ToolCall("f", {}),)
    (bad,) = found.read('[TOOL_CALLS] [{"name": "f"}]').calls
    assert bad.reason == "it has no 'arguments', arguments"
    _, found = form(MISTRAL_11)
    assert found.read('[TOOL_CALLS]f[ARGS]{"x": 1}').calls == (ToolCall("f", {"x": 1}),)
    (bad,) = found.read('[TOOL_CALLS]f{"x": 1}').calls
    assert bad.reason == "it has no arguments"
    _, found = form(DEEPSEEK)
    assert found.read("<|calls|><|call|>function<|sep|>f\n```json\n{}\n```<|end_call|><|end_calls|>").calls == (
        ToolCall("f", {}),
    )


def test_a_response_template_reads_what_is_not_json():
    properties = {"x": {"type": "integer"}, "y": {"type": "string"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    tokenizer, found = form(XML, [tool], response_template=XML_RESPONSES)
    call = ToolCall("f", {"x": 7, "y": "8"})
    assert found.read(generated(tokenizer, [call, call], "So:")) == formats.Turn("So:", (call, call))
    assert found.read("Plain.") == formats.Turn("Plain.")


def test_a_response_template_that_fails_on_a_turn_gives_a_bad_call():
    fields = XML_RESPONSES["fields"]
    calls = {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True}
    calls["transform"] = {"type": "function", "function": "{content}"}
    template = {**XML_RESPONSES, "fields": {**fields, "tool_calls": calls}}
    _, found = form(QWEN2_5, response_template=template)
    assert found.read('<tool_call>{"name": "f", "arguments": {}}</tool_call>').calls == (ToolCall("f", {}),)
    (bad,) = found.read("<tool_call>{no}</tool_call>").calls
    assert isinstance(bad, BadCall)
    (bad,) = found.read('<tool_call>{"name": "f"}</tool_call>').calls
    assert bad.reason == "its arguments are no object"


REFUSED = {
    "no calls": (QWEN2_5.replace("message.tool_calls or []", "[]"), "it writes no tool calls"),
    "not JSON": (XML, "it writes a call as '<tool_call>\\n<function=first_probe>"),
    "escapes dropped": (
        QWEN2_5.replace("arguments | tojson }}", "arguments | tojson | replace('\\\\', '') }}"),
        "cannot be read back",
    ),
    "a refusal": (
        QWEN2_5.replace("message.tool_calls or []", "raise_exception('no tools')"),
        "it refuses it: no tools",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_calls_cannot_be_read_back_is_refused(name):
    template, said = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        form(template)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "set model.chat_template=FILE.jinja" in str(caught.value)


def test_a_template_of_one_call_a_turn_is_proved_too():
    with pytest.raises(ModelError, match="cannot be read back"):
        form(LLAMA3.replace("call.arguments | tojson }}", "call.arguments | tojson | replace('\\\\', '') }}"))


def test_what_a_template_writes_before_every_turn_is_no_part_of_a_call():
    written_first = QWEN2_5.replace("'<|im_start|>assistant\\n' + ''", "'<|im_start|>assistant\\nI say:\\n' + ''")
    without_words = QWEN3.replace("+ message.content }}", "+ ('' if message.tool_calls else message.content) }}")
    assert written_first != QWEN2_5
    assert without_words != QWEN3
    for template in (written_first, without_words):
        _, found = form(template)
        assert found.read('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>').calls == (ToolCall("f", {}),)


def test_a_tokenizer_that_changes_calls_is_refused():
    from tokenizers import normalizers

    tokenizer = with_tools(QWEN2_5)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("_", "-")
    with pytest.raises(ModelError, match="cannot be read back"):
        tool_format(tokenizer, probe(tokenizer), [])


def test_calls_in_messages_have_ids_of_nine_characters():
    calls = wire_calls([ToolCall("f", {"x": 1}), BadCall("why", "what")], first=41)
    assert json.loads(json.dumps(calls)) == [
        {"id": "call00041", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "call00042", "type": "function", "function": {"name": "unreadable", "arguments": {"text": "what"}}},
    ]
    assert len(call_id(7)) == 9
