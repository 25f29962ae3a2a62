"""Rows with values of any kind in any place: encoded, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_world import CHATML, byte_tokenizer, save_rows

from rlpost.data.codec import Codec, make_codec
from rlpost.data.dataset import open_dataset, texts
from rlpost.data.fitting import Limit
from rlpost.data.formats import DataRole
from rlpost.data.params import Source, TooLong
from rlpost.errors import RlpostError

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(allow_nan=True, width=32),
    st.sampled_from(["", " ", "a", "b", "yes", "<|im_end|>", "{}", "[1]", '{"a": 1}', "assistant", "user"]),
)
KEYS = st.sampled_from(["role", "content", "name", "tool_calls", "function", "arguments", "weight", "ids", "x"])
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
ASKED, SAID = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = [{"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 1, "x": None}]
RECORDED = {"text": "b", "reward": 1.0, "ids": [1, 2], "action": [1, 1], "logprobs": [-0.1, -0.2]}
ROWS: dict[DataRole, tuple[dict[str, Any], ...]] = {
    DataRole.completions: (
        {"prompt": "a", "completion": "b"},
        {"prompt": ASKED, "completion": SAID, "tools": [{"name": "f", "parameters": {}}]},
        {"prompt": "a", "completions": ["b", "c"]},
        {"messages": ASKED + SAID, "system": "", "tools": None},
        {"messages": ASKED + CALLED},
        {"text": "ab"},
    ),
    DataRole.pairs: (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
        {"prompt": ASKED, "chosen": SAID, "rejected": [{"role": "assistant", "content": "c"}]},
        {"chosen": ASKED + SAID, "rejected": [*ASKED, {"role": "assistant", "content": "c"}]},
    ),
    DataRole.prompts: ({"prompt": "a"}, {"prompt": ASKED}, {"messages": ASKED + SAID}),
    DataRole.labelled: (
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": ASKED, "completion": SAID, "label": 0},
    ),
    DataRole.ranked: (
        {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, None, 0]},
        {"prompt": ASKED, "chosen": "b", "rejected": "c"},
    ),
    DataRole.steps: ({"prompt": "a", "steps": ["b", "c"], "labels": [1, 0.5]},),
    DataRole.recorded: ({"prompt": [1, 2], "completions": [RECORDED], "example": {"answer": "b"}},),
}
"""Good rows of every format."""
KNOWS_CALLS = CHATML.replace(
    "<|im_end|>",
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>",
    1,
).replace("{% for", "{{ tools | tojson if tools else '' }}{% for", 1)


def spoiled(value: Any, draw: Callable[[Any], Any]) -> Any:
    """The value with something in it taken out, or made anything."""
    if draw(st.integers(0, 3)) and isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if draw(st.booleans()) else {**rest, key: spoiled(value[key], draw)}
    if draw(st.integers(0, 3)) and isinstance(value, list) and value:
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], *([] if draw(st.booleans()) else [spoiled(value[i], draw)]), *value[i + 1 :]]
    return draw(ANYTHING)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return make_codec(byte_tokenizer(KNOWS_CALLS))


def no_stage(name: str) -> Path:
    raise AssertionError(name)


def refusal(action: Callable[[], object]) -> str:
    """What an action says when it refuses, or nothing; anything but an error for the user fails the test."""
    try:
        action()
    except RlpostError as error:
        return str(error)
    return ""


def attempt(file: Path, need: DataRole, codec: Codec, **options: Any) -> bool:
    """Whether the rows are read; they may be refused in one line that names them."""
    sources = {"c": Source(path=str(file), **options)}
    about: dict[str, Any] = {"where": "data", "stages": no_stage, "bind": no_stage}

    def use() -> None:
        data = open_dataset(sources, codec, need=need, limit=Limit(200, TooLong.cut), seed=0, **about)
        json.dumps([data.notices, data.fingerprint])
        data.next(2)

    said = [refusal(lambda: texts(sources, **about)), refusal(use)]
    assert not any("\n" in line for line in said)
    assert not said[1] or str(file) in said[1]
    return not said[1]


@pytest.mark.parametrize("examples", [50, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("need", ROWS)
def test_no_value_of_a_row_ends_in_a_traceback(need, examples, codec, tmp_path, tally):
    told = {True: 0, False: 0}

    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        good = data.draw(st.sampled_from(ROWS[need]))
        row = {
            **good,
            **data.draw(st.just({}) | st.dictionaries(st.sampled_from(["tools", "system"]), ANYTHING, max_size=1)),
        }
        key = data.draw(st.sampled_from(sorted(good)))
        spoilt = {k: v for k, v in row.items() if k != key}
        if data.draw(st.integers(0, 4)):
            spoilt[key] = spoiled(row[key], data.draw)
        rows = [good, spoilt] if data.draw(st.integers(0, 5)) else [spoilt]
        told[attempt(save_rows(tmp_path / "rows.jsonl", rows), need, codec)] += 1

    fuzz()
    assert told[False] > examples / 5
    tally("rows of any kind", right=told[True], refused=told[False])
