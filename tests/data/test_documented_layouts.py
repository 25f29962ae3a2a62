"""The table of data as it comes in docs/data.md: every line is what happens, decided by the tokens that are trained."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conversations import CHATML, make
from test_layouts import ASKED, HH, KTO, PAIRS, PROMPTS, RANKED, SFT, TALK, bot, said, same, system, user

from rlpost.data.codec import make_codec
from rlpost.data.dataset import open_dataset
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import Source
from rlpost.errors import DataError

PAGE = Path(__file__).parents[2] / "docs/data.md"
NEEDS = {
    "sft": SFT,
    "dpo": PAIRS,
    "kto": KTO,
    "reward_model": RANKED,
    "process_reward_model": DataRole.steps,
    "grpo": PROMPTS,
}
PROMPT, ANSWERED = {"prompt": "Hi"}, {"prompt": "Hi", "completion": "Hello"}
LABELLED = {"prompt": TALK[:1], "completion": "Hello", "label": True}
PAIR = {"chosen": "a", "rejected": "b"}
CHAT_PAIR = {"prompt": TALK[:1], **PAIR}
ANSWERS = [{"response": "a", "overall_score": 2.0}, {"response": "b", "overall_score": 1.0}]
RANKING = {"prompt": "Hi", "completions": ["a", "b"], "scores": [2.0, 1.0]}
STEPS = {"prompt": "Hi", "steps": ["a\n", "b\n"], "labels": [1, 0]}
ROWS = {
    "prompt, completion": (ANSWERED, ANSWERED),
    "question, answer": ({"question": "Hi", "answer": "Hello"}, ANSWERED),
    "input, output": ({"input": "Hi", "output": "Hello"}, ANSWERED),
    "messages": ({"messages": TALK}, {"messages": TALK}),
    "messages as JSON text": ({"messages": json.dumps(TALK)}, {"messages": TALK}),
    "text": ({"text": "Hello"}, {"text": "Hello"}),
    "alpaca": (
        {"instruction": "b", "input": "c", "output": "d", "system": "s", "history": [["Hi", "Hello"]]},
        {"messages": [system("s"), *TALK, user("b\nc"), bot("d")]},
    ),
    "alpaca and its rendered text": (
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "Hi! Hello"},
        {"messages": TALK},
    ),
    "dolly": ({"instruction": "a", "context": "b", "response": "c"}, {"messages": [user("a\nb"), bot("c")]}),
    "OpenOrca": (
        {"id": 1, "system_prompt": "s", "question": "Hi", "response": "Hello"},
        {"messages": [system("s"), *TALK]},
    ),
    "ShareGPT": ({"id": "a", "conversations": ASKED, "system": "s"}, {"messages": [system("s"), *TALK]}),
    "conversations of roles": ({"conversations": TALK}, {"messages": TALK}),
    "ShareGPT and messages": ({"messages": TALK, "conversations": ASKED}, {"messages": TALK}),
    "messages of parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TALK[1]]}, None),
    "prompt as JSON text": ({"prompt": json.dumps(TALK[:1]), "completion": "Hello"}, None),
    "pairs": ({**PROMPT, **PAIR}, {**PROMPT, **PAIR}),
    "pairs of conversations": ({"chosen": [TALK[0], bot("a")], "rejected": [TALK[0], bot("b")]}, CHAT_PAIR),
    "HH-RLHF": ({"chosen": HH.format("a"), "rejected": HH.format("b")}, CHAT_PAIR),
    "pairs of texts alone": (PAIR, None),
    "alpaca pairs": (
        {"instruction": "Hi", "input": "x", "system": "s", **PAIR},
        {"prompt": [system("s"), user("Hi\nx")], **PAIR},
    ),
    "ShareGPT pairs": (
        {"conversations": ASKED[:1], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        CHAT_PAIR,
    ),
    "ShareGPT pairs of conversations": (
        {"chosen": [ASKED[0], said("gpt", "a")], "rejected": [ASKED[0], said("gpt", "b")]},
        CHAT_PAIR,
    ),
    "Orca pairs": (
        {"system": "s", "question": "Hi", **PAIR},
        {"prompt": [system("s"), user("Hi")], **PAIR},
    ),
    "labels": ({**ANSWERED, "label": "thumbs_up"}, {**ANSWERED, "label": True}),
    "alpaca labels": ({"instruction": "Hi", "output": "Hello", "label": 1}, LABELLED),
    "alpaca tags": ({"instruction": "Hi", "input": "", "output": "Hello", "kto_tag": True}, LABELLED),
    "labelled conversations": ({"conversations": ASKED, "label": "true"}, LABELLED),
    "scores": (RANKING, RANKING),
    "responses, rewards": ({**PROMPT, "responses": ["a", "b"], "rewards": [2.0, 1.0]}, RANKING),
    "UltraFeedback": ({"instruction": "Hi", "completions": ANSWERS}, {**RANKING, "prompt": TALK[:1]}),
    "ranks": ({**PROMPT, "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}, None),
    "steps of TRL": ({**PROMPT, "completions": STEPS["steps"], "labels": [1, 0]}, STEPS),
    "prompts": (PROMPT, PROMPT),
    "questions": ({"question": "Hi", "answer": "Hello"}, PROMPT),
    "ShareGPT prompts": ({"conversations": ASKED}, {"prompt": TALK[:1]}),
}
"""Name in the table -> (a row, a row of a format that trains the same; None where it is refused)."""


def table():
    """Name -> (stage, what is done) of each line of the table."""
    section = PAGE.read_text("utf-8").partition("### Data as it comes")[2].partition("\n#")[0]
    lines = re.findall(r"(?m)^\| ([^|`-][^|`]*?) \| .+? \| `(\w+)` \| (.+?) \|$", section)
    return {name: (stage, verdict) for name, stage, verdict in lines}


@pytest.fixture(scope="module")
def chatml():
    return make_codec(make(CHATML))


def opened(folder, row, need, codec, columns=None):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    source = {"main": Source(path=str(path), columns=columns or {})}
    options = {"need": need, "limit": Limit(1000), "seed": 0, "where": "data", "stages": None, "bind": None}
    return open_dataset(source, codec, **options).all()


@pytest.mark.parametrize("name", ROWS)
def test_a_line_of_the_table_is_what_happens(name, tmp_path, chatml):
    stage, verdict = table()[name]
    row, canonical = ROWS[name]
    need = NEEDS[stage]
    if verdict == "as it is":
        found = opened(tmp_path, row, need, chatml)
    else:
        with pytest.raises(DataError) as caught:
            opened(tmp_path, row, need, chatml)
        assert "\n" not in str(caught.value)
        if verdict == "refused":
            assert canonical is None
            return
        mapping = verdict.strip("`")
        assert mapping in str(caught.value)
        found = opened(tmp_path, row, need, chatml, yaml.safe_load(mapping)["columns"])
    assert same(found, opened(tmp_path, canonical, need, chatml))
    completions = [c for group in found for c in group.completions]
    assert all(c.actions for c in completions)
    assert bool(completions) is (need is not PROMPTS)


def test_the_table_has_all_that_is_tested_and_no_more():
    assert set(table()) == set(ROWS)
    assert len(table()) == len(ROWS)
