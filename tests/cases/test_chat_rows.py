"""What a row says is in what the model reads, or the row is refused: calls, reasoning, tools, names, and the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import CHATML, Ran, byte_tokenizer, rlpost, save_model, save_recipe, save_rows, tiny_model

Row = dict[str, Any]

CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
TOOLS = CHATML.replace("<|im_end|>", CALLS + "<|im_end|>", 1).replace(
    "{% for m", "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m", 1
)
TEXT_CALLS = TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
NEITHER = TOOLS.replace(
    "arguments | tojson", "arguments if c.function.arguments is mapping else c.function.arguments | tojson"
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}
WEATHER = [{"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": SCHEMA}}]
ASK, SAY = {"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."}


def call(arguments: Any = None, **more: Any) -> Row:
    function = {"name": "weather", "arguments": {"city": "Oslo"} if arguments is None else arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}], **more}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    """Template -> the folder of a tiny model that has it."""
    base, made = tmp_path_factory.mktemp("models"), {}

    def model(template: str) -> Path:
        if template not in made:
            tokenizer = byte_tokenizer(template)
            small = tiny_model(vocabulary=len(tokenizer), max_position_embeddings=2048)
            made[template] = save_model(base / str(len(made)), small, tokenizer)
        return made[template]

    return model


def show(model: Path, rows: list[Row], kind: str = "sft", *, source: Row | None = None, **stage: Any) -> Ran:
    """`rlpost show --rows 9` of a stage on these rows."""
    save_rows(Path("rows.jsonl"), rows)
    learns = {} if kind == "pairs" else {"steps": 1, "learning_rate": 1e-3}
    whole = {"kind": kind, "data": {"c": {"path": "rows.jsonl", **(source or {})}}, **learns, **stage}
    save_recipe(Path("r.yaml"), {"model": {"path": str(model)}, "stages": {"s": whole}})
    return rlpost("show", "r.yaml", "--rows", 9)


def trained(ran: Ran) -> str:
    """The rows as shown: after the lengths."""
    assert ran.code == 0, ran.err
    return ran.out.split("tokens: least")[-1].split("\n", 1)[1]


def messages(*turns: Row, **more: Any) -> Row:
    return {"messages": list(turns), **more}


THOUGHT = "two and two are four"
LEFT_OUT: dict[str, tuple[Row, str]] = {
    "call": (messages(ASK, call()), "message 2, its tool_calls"),
    "call beside text": (messages(ASK, call(content="Let me look.")), "message 2, its tool_calls"),
    "earlier call": (
        messages(ASK, call(), {"role": "tool", "content": "wet"}, SAY),
        "message 2, its tool_calls",
    ),
    **{
        key: (messages(ASK, {**SAY, key: THOUGHT}), f"message 2, its {key}")
        for key in ("reasoning_content", "thinking", "reasoning", "mood", "function_call")
    },
    "earlier reasoning": (messages(ASK, {**SAY, "thinking": THOUGHT}, ASK, SAY), "message 2, its thinking"),
    "nested": (messages(ASK, {**SAY, "extra": {"notes": [THOUGHT]}}), "message 2, its extra"),
    "number": (messages(ASK, {**SAY, "score": 3}), "message 2 (assistant): its score"),
    "flag": (messages(ASK, {**SAY, "cached": True}), "message 2 (assistant): its cached"),
    "user's name": (messages({**ASK, "name": "Ada"}, SAY), "message 1 (user): its name"),
    "tools": (messages(ASK, SAY, tools=WEATHER), "tools[0].function.name"),
    "tools as text": (messages(ASK, SAY, tools=json.dumps(WEATHER)), "tools[0].function.name"),
    "old functions": (messages(ASK, SAY, functions=WEATHER), "column 'functions'"),
    "system column": (messages(ASK, SAY, system="Be brief."), "column 'system'"),
    "documents": (messages(ASK, SAY, documents=[{"title": "t", "text": "u"}]), "column 'documents'"),
    "unknown tool": (messages(ASK, SAY, {"role": "tool", "content": "wet", "name": "sky"}, SAY), "its name"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused(name, models, here, tally):
    row, words = LEFT_OUT[name]
    assert show(models(CHATML), [messages(ASK, SAY), row]).refused(3, "rows.jsonl:2", words, "unrendered=drop")
    tally("what a template leaves out", refused=1)


@pytest.mark.parametrize("name", ["call beside text", "mood", "old functions"])
def test_or_dropped_or_ignored_aloud_if_the_recipe_says_so(name, models, here, tally):
    rows = [messages(ASK, SAY), LEFT_OUT[name][0]]
    dropped = show(models(CHATML), rows, source={"unrendered": "drop"})
    assert trained(dropped).count("»") == 1
    assert "1 of 2 rows dropped: the chat template leaves out a part of them (first: " in dropped.out
    assert "rows.jsonl:2): " in dropped.out
    ignored = show(models(CHATML), rows, source={"unrendered": "ignore"})
    assert trained(ignored).count("»") == 2
    assert "1 of 2 rows are read without what the chat template leaves out" in ignored.out
    tally("what a template leaves out", right=2)


def test_no_turn_is_trained_as_its_end_alone(models, here, tally):
    ran = show(models(CHATML), [LEFT_OUT["call"][0]], source={"unrendered": "ignore"})
    assert ran.refused(3, "renders nothing of a turn but its end")
    tally("what a template leaves out", refused=1)


def test_tools_of_a_row_of_plain_text_are_read_by_nobody(models, here, tally):
    row = {"prompt": "Rain?", "completion": "No.", "tools": WEATHER}
    assert show(models(TOOLS), [row]).refused(3, "rows.jsonl:1", "column 'tools' is not read")
    assert "»No." in trained(show(models(TOOLS), [{**row, "tools": []}]))
    tally("what a template leaves out", right=1, refused=1)


def test_a_run_renders_the_day_it_began_on(models, here, tally):
    save_rows(Path("rows.jsonl"), [messages(ASK, SAY)])
    stage = {"kind": "sft", "data": {"c": {"path": "rows.jsonl"}}, "steps": 1, "learning_rate": 1e-3}
    dated = models("{{ strftime_now('%d %b %Y') }}" + CHATML)
    save_recipe(Path("r.yaml"), {"model": {"path": str(dated)}, "stages": {"s": stage}})
    assert rlpost("train", "r.yaml", "run=own").code == 0
    assert any('"now": "20' in file.read_text("utf-8") for file in Path("runs/own").glob("*.json"))
    tally("templates that tell the day", right=1)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("dpo", {"prompt": [ASK], "chosen": [call()], "rejected": [SAY]}),
        ("dpo", {"prompt": [ASK], "chosen": [SAY], "rejected": [call()]}),
        (
            "reward_model",
            {"chosen": [ASK, {**SAY, "thinking": THOUGHT}], "rejected": [ASK, {**SAY, "content": "Yes."}]},
        ),
        ("kto", {"prompt": [ASK], "completion": [call()], "label": True}),
        ("sft", {"prompt": [ASK], "completions": [[SAY], [call()]]}),
        ("grpo", {"prompt": [ASK], "tools": WEATHER}),
        ("grpo", {"prompt": [{**ASK, "name": "Ada"}]}),
        ("grpo", {"prompt": [ASK, call(), {"role": "tool", "content": "wet"}]}),
        ("pairs", {"messages": [ASK, {**SAY, "thinking": THOUGHT}, ASK, SAY]}),
    ],
)
def test_so_it_is_in_every_kind_of_stage(kind, row, models, here, tally):
    more: Row = {"rewards": [{"fn": "length", "args": {"target": 8}}]} if kind in ("grpo", "pairs") else {}
    ran = show(models(CHATML), [row], kind, **more)
    assert ran.refused(3, "rows.jsonl:1", "leaves out"), ran
    tally("what a template leaves out", refused=1)


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_role_that_the_template_skips_is_refused(role, models, here, tally):
    only = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ['user', 'assistant'] %}")
    row = messages(ASK, SAY, {"role": role, "content": "wet"}, SAY)
    assert show(models(only), [row]).refused(3, f"message 3 ({role}): its content")
    tally("what a template leaves out", refused=1)


def test_a_template_that_cuts_what_the_user_says_is_refused(models, here, tally):
    cut = CHATML.replace(
        "m['content'] }}", "(m['content'].split('###')[-1] if m['role'] == 'user' else m['content']) }}"
    )
    row = messages({"role": "user", "content": "Look: ### what is it?"}, SAY)
    assert show(models(cut), [row]).refused(3, "a part of message 1 (user): its content")
    assert "»No." in trained(show(models(cut), [messages(ASK, SAY)]))
    tally("what a template leaves out", right=1, refused=1)


@pytest.mark.parametrize("template", [TOOLS, TEXT_CALLS], ids=["objects", "text"])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}', '{"city":"Oslo"}'])
@pytest.mark.parametrize(
    "tools", [WEATHER, json.dumps(WEATHER), [json.dumps(WEATHER[0])]], ids=["list", "json", "jsons"]
)
def test_calls_and_tools_come_out_once_as_json_however_they_are_given(template, arguments, tools, models, here, tally):
    shown = trained(show(models(template), [messages(ASK, call(arguments), tools=tools)]))
    assert '»<tool_call>⏎{"name": "weather", "arguments": {"city": "Oslo"}}⏎</tool_call><|im_end|>«' in shown
    assert '"function": {"name": "weather", "description": "Tells it"' in shown
    tally("tool calls", right=1)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (messages(ASK, call("{city}")), "its arguments: '{city}' is not JSON"),
        (messages(ASK, call("[1]")), "its arguments are list, not an object"),
        (messages(ASK, {"role": "assistant", "content": None, "tool_calls": [{"name": 3}]}), "names no function"),
        (messages(ASK, {"role": "assistant", "content": None, "tool_calls": "weather"}), "tool_calls are str"),
        (messages(ASK, {"role": "assistant", "content": None}), "its content is missing"),
        (messages(ASK, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}), "a list of parts"),
        (messages(ASK, SAY, tools="weather"), "'tools': 'weather' is not JSON"),
        (messages(ASK, SAY, tools=[3]), "tools[0] is int"),
        (messages(ASK, SAY, tools=3), "'tools' is int"),
        (messages({"role": "function", "content": "wet"}, SAY), "role 'function' is none of"),
        (messages(ASK, {**SAY, "weight": 0.5}), "its weight is 0.5"),
        (messages({**ASK, "train": True}, SAY), "only turns of the assistant"),
        (messages(ASK, {**SAY, "weight": 0}), "no assistant turn after a prompt that is to be trained"),
    ],
)
def test_malformed_conversations_are_refused_by_the_line_of_the_file(row, words, models, here, tally):
    assert show(models(TOOLS), [row]).refused(3, "rows.jsonl:1", words)
    tally("malformed conversations", refused=1)


def test_a_template_that_writes_arguments_in_no_form_of_json_is_refused(models, here, tally):
    assert show(models(NEITHER), [messages(ASK, call())]).refused(3, "neither from an object nor from text")
    tally("tool calls", refused=1)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_turn_that_is_marked_so_is_not_trained(mark, models, here, tally):
    turns = [ASK, {"role": "assistant", "content": "FIVE", **mark}, ASK, {**SAY, "weight": 1, "train": True}, ASK]
    shown = trained(show(models(CHATML), [messages(*turns)]))
    assert "FIVE<|im_end|>⏎" in shown
    assert shown.count("»") == 1
    assert shown.rstrip().endswith("»No.<|im_end|>«")
    last = trained(show(models(CHATML), [messages(ASK, SAY, ASK, {"role": "assistant", "content": "FIVE", **mark})]))
    assert "FIVE" not in last
    tally("turns marked as untrained", right=2)


def test_what_arrow_fills_up_is_taken_out_and_a_null_of_json_stays(models, here, tally):
    import pyarrow
    import pyarrow.parquet

    other = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "properties": {}}}}
    add = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": {"n": 1}}}]}
    rows = [messages(ASK, call(), tools=WEATHER), messages(ASK, add, tools=[other])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    shown = trained(show(models(TOOLS), [], source={"path": "rows.parquet"}))
    assert "null" not in shown.lower()
    assert "none" not in shown.lower()
    assert '"arguments": {"city": "Oslo"}}' in shown
    assert '"arguments": {"n": 1}}' in shown
    assert '"arguments": {"city": null}}' in trained(show(models(TOOLS), [messages(ASK, call({"city": None}))]))
    tally("nulls of columns of structs", right=3)


def test_a_prompt_beside_whole_conversations_says_no_more_than_they(models, here, tally):
    pair = {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "Yes."}]}
    system = {"role": "system", "content": "Be brief."}
    assert show(models(CHATML), [{"prompt": [system, ASK], **pair}], "dpo").refused(3, "rows.jsonl:1", "(system)")
    for prompt in ("Rain?", [ASK], None):
        assert "»No.<|im_end|>«" in trained(show(models(CHATML), [{"prompt": prompt, **pair}], "dpo"))
    twice = {"prompt": [ASK], "completion": [ASK, SAY]}
    assert show(models(CHATML), [twice]).refused(3, "the answer repeats the prompt")
    tally("prompts beside conversations", right=3, refused=2)


def test_blank_lines_count_in_the_line_of_a_row(models, here, tally):
    save_rows(Path("good.jsonl"), [messages(ASK, SAY)])
    text = Path("good.jsonl").read_text("utf-8")
    Path("own.jsonl").write_text(f'{text}\n\n{{"messages": 3}}\n', "utf-8")
    data = {"c": {"path": "own.jsonl", "kfold": {"by": "messages", "of": 2, "hold_out": 0}}}
    for source in ({"path": "own.jsonl"}, data["c"]):
        ran = show(models(CHATML), [], source=source)
        assert ran.refused(3, "own.jsonl:4)") or (ran.code == 0 and source is data["c"])
    tally("places of rows", refused=1)


def test_plain_rows_of_a_chat_model_are_pointed_out(models, here, tally):
    said = "1 rows are plain text, which does not go through the model's chat template"
    assert said in show(models(CHATML), [{"prompt": "Rain?", "completion": "No."}]).out
    assert said in show(models(CHATML), [{"text": "It rains."}]).out
    assert said not in show(models(CHATML), [{"text": "<|im_start|>user\nRain?<|im_end|>"}]).out
    assert said not in show(models(CHATML), [messages(ASK, SAY)]).out
    tally("plain rows of a chat model", right=4)
