from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.errors import RecipeError
from rlpost.recipe import overrides
from rlpost.recipe.overrides import parse


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("a=1", "a", 1),
        ("a.b=1e-4", "a.b", 1e-4),
        ("a=null", "a", None),
        ("a=", "a", ""),
        ("a=text with spaces", "a", "text with spaces"),
        ("a='x, y'", "a", "x, y"),
        ("a=[1,{b: c}]", "a", [1, {"b": "c"}]),
        ("a=${vars.x}", "a", "${vars.x}"),
        ("a=/tmp/x.py:f", "a", "/tmp/x.py:f"),
        ("a=~/data.jsonl", "a", "~/data.jsonl"),
        ("a=x(1).jsonl", "a", "x(1).jsonl"),
        ("a=7+8=", "a", "7+8="),
        ("a=müde", "a", "müde"),
        ("rewards[0].weight=2", "rewards[0].weight", 2),
    ],
)
def test_values_are_read_as_hydra_reads_them_and_plain_text_as_text(override: str, key: str, value: Any) -> None:
    assert parse(override) == (key, value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+a=1", "'+' is not needed and refused"),
        ("++a=1", "refused"),
        ("~a=1", "'~' is not needed"),
        ("hydra.run.dir=x", "hydra's own settings are refused"),
        ("hydra=x", "hydra's own settings are refused"),
        ("a", "expected key=value"),
        ("=1", "'' is no key"),
        ("a b=1", "'a b' is no key"),
        ("a@b=1", "is no key"),
        ("a..b=1", "is no key"),
        ("a=1,2", "expected one value"),
        ("a=range(3)", "expected one value"),
        ("a=choice(1,2)", "expected one value"),
        ("a=[1", "the value cannot be read"),
        ("a=" + "x" * 30_000, "longer than 20000 characters"),
    ],
)
def test_what_is_no_plain_setting_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(override)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-0",
        "01",
        "7",
        "-7",
        "111111111111111111",
        "1111111111111111111",
        "0.5",
        "-0.0",
        "1.",
        ".5",
        "1e-3",
        "2.5e7",
        "1E5",
        "1e05",
        "1e400",
        "true",
        "True",
        "false",
        "null",
        "Null",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "yes",
        "a.b-c",
        "_",
        "e5",
        "a--b",
        "true.x",
        "/tmp/x",
        "/",
        "//",
        "/tmp/1e5/true",
        "/a/null",
        "./x",
        "x/y.yaml",
        "smollm2",
        "model:x",
        "-a",
        "1a",
    ],
)
def test_what_is_read_without_hydra_is_read_as_hydra_does(text: str) -> None:
    found = []
    for read in (overrides._value, overrides._parsed):
        try:
            value = read(text, text)
        except RecipeError as error:
            value = str(error)
        found.append((type(value), repr(value)))
    assert found[0] == found[1]


@given(st.text("0159eE._/-TrueFalsnNulif", min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_whatever_is_read_without_hydra_is_read_as_hydra_does(text: str) -> None:
    test_what_is_read_without_hydra_is_read_as_hydra_does(text)
