from __future__ import annotations

from typing import Any

import pytest

from rlpost.errors import RecipeError
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
