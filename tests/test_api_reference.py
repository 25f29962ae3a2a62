"""docs/api.md is what signatures and docstrings say, and it has all that Python is offered."""

from __future__ import annotations

import inspect
import re

import api_docs
import pytest

import rlpost
from rlpost import objectives


@pytest.fixture(scope="module")
def page() -> str:
    return api_docs.page()


def test_the_page_is_what_the_docstrings_say(page):
    assert page == api_docs.PAGE.read_text("utf-8"), "run `make reference`"


def test_every_name_is_there_once_and_says_what_it_is(page):
    headings = re.findall(r"(?m)^### (\w+)$", page)
    offered = [name for name in rlpost.__all__ if name != "__version__"] + objectives.__all__
    assert sorted(headings) == sorted(offered)
    for _, section in re.findall(r"(?ms)^###+ ([\w.]+)$(.*?)(?=^##|\Z)", page):
        assert re.search(r"```\n\n\S", section), section


def test_signatures_are_those_of_python(page):
    for name in objectives.__all__:
        found = getattr(objectives, name)
        if inspect.isclass(found):
            continue
        (written,) = re.findall(rf"(?ms)^rlpost\.objectives\.{name}\((.*?)\)(?: ->.*?)?\n```", page)
        for parameter in inspect.signature(found).parameters.values():
            assert re.search(rf"\b{parameter.name}\b", written), f"{name}: {parameter}"


def test_docstrings_are_read_as_markdown():
    sections = "Args:\n    a: one\n        thing.\n\nRaises:\n    ValueError: no. TypeError: none."
    text = f"Sum of a*b < c, *not* ``x * y``.\n\n{sections}"
    assert list(api_docs.told(text)) == [
        *["Sum of a\\*b &lt; c, *not* `x * y`.", "", "**Arguments**", "", "- `a`: one thing.", ""],
        *["**Raises**", "", "- `ValueError`: no. `TypeError`: none.", ""],
    ]
