"""Functions of a user's file as tools: what a model is told of them, and calls with what a model wrote."""

import asyncio
import re

import pytest

from rlpost.errors import RecipeError
from rlpost.usercode.binding import bind
from rlpost.usercode.params import TOOL, ToolFunction

FILE = '''
import asyncio
import os
import time
from enum import Enum
from typing import Literal


class Unit(Enum):
    celsius = "C"
    fahrenheit = "F"


def weather(city: str, days: int = 3, unit: Unit = Unit.celsius, *, key: str) -> dict:
    """The weather of a city.

    Args:
        city: Its name.
        days: How many days.
        unit: Of temperatures.
        key: A secret.
    """
    return {"city": city, "days": days, "unit": unit.name, "key": key}


async def slowly(words: list[str], kind: Literal["a", "b"] = "a") -> str:
    """Join words.

    Args:
        words: Them.
        kind: Of joining.
    """
    await asyncio.sleep(0.01)
    if not words:
        raise LookupError("no words")
    return kind.join(words)


def raises(x: float) -> float:
    """Divide.

    Args:
        x: By it.
    """
    return 1 / x


def hangs() -> None:
    """Never returns."""
    time.sleep(60)


def dies() -> None:
    """Ends its process."""
    os._exit(3)


def odd() -> object:
    """Returns no JSON."""
    return {1, 2}


def nothing() -> None:
    """Returns nothing."""


def untyped(x):
    """Something.

    Args:
        x: It.
    """


def untold(x: int) -> int:
    """Something."""
    return x


def silent(x: int) -> int:
    return x


def unlike_json(x: set) -> int:
    """Something.

    Args:
        x: It.
    """
    return 1


def many(*x: int) -> int:
    """Something."""
    return 1
'''


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "tools.py").write_text(FILE, "utf-8")

    def made(name, args=None, deadline=None):
        return bind(ToolFunction(fn=f"tools.py:{name}", args=args or {}, deadline=deadline), TOOL, "tools[0]", folder)

    return made


def called(tool, *arguments):
    return tool.call.each([{"arguments": one} for one in arguments], keep_going=True)


def test_schema_has_what_the_recipe_does_not_give(tool):
    assert tool("weather", {"key": "k", "days": 1}).call.schema()["function"] == {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "unit": {"type": "string", "enum": ["C", "F"], "description": "Of temperatures."},
            },
            "required": ["city"],
        },
    }


def test_arguments_are_converted_and_given_ones_added(tool):
    weather = tool("weather", {"key": "k"})
    first, second = called(weather, {"city": "Oslo", "days": "7"}, {"city": "São", "unit": "F"})
    assert first == {"text": '{"city": "Oslo", "days": 7, "unit": "celsius", "key": "k"}', "failed": False}
    assert second["text"] == '{"city": "São", "days": 3, "unit": "fahrenheit", "key": "k"}'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "Error: arguments of weather: city: is missing"),
        ({"city": "a", "days": "x"}, "Error: arguments of weather: days: Input should be a valid integer"),
        ({"city": "a", "key": "mine"}, "Error: arguments of weather: key: there is no such parameter"),
        ({"city": "a", "unit": "K"}, "Error: arguments of weather: unit: Input should be 'C' or 'F'"),
        ({"city": 3}, "Error: arguments of weather: city: Input should be a valid string"),
    ],
)
def test_arguments_that_do_not_fit_are_told(tool, arguments, said):
    (found,) = called(tool("weather", {"key": "k"}), arguments)
    assert found["failed"]
    assert found["text"].startswith(said)
    assert "\n" not in found["text"]


def test_exceptions_become_text(tool):
    assert called(tool("raises"), {"x": 0}) == [
        {"text": "Error: ZeroDivisionError: float division by zero", "failed": True}
    ]
    (odd,) = called(tool("odd"), {})
    assert odd == {"text": "Error: TypeError: Object of type set is not JSON serializable", "failed": True}
    assert called(tool("nothing"), {}) == [{"text": "null", "failed": False}]


def test_coroutine_functions_are_called_alike(tool):
    slowly = tool("slowly")
    found = called(slowly, {"words": ["x", "y"]}, {"words": []}, {"words": "x"}, {"words": ["x"], "kind": "c"})
    assert found[0] == {"text": "xay", "failed": False}
    assert found[1] == {"text": "Error: LookupError: no words", "failed": True}
    assert found[2]["text"].startswith("Error: arguments of slowly: words: Input should be a valid list")
    assert found[3]["text"] == "Error: arguments of slowly: kind: Input should be 'a' or 'b'"
    reply = asyncio.run(slowly.call.once({"arguments": {"words": ["p", "q"], "kind": "b"}}, 1, None))
    assert reply.found["text"] == "pbq"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("untyped", "tools[0].fn: untyped: its parameter 'x' has no type - annotate it, like `x: str` ("),
        ("untold", "because the docstring has no description for the argument 'x' - give types that JSON has, and a"),
        ("silent", "tools[0].fn: silent has no docstring, which tells a model what it does - write one ("),
        ("unlike_json", "Couldn't convert the type hint <class 'set'>"),
        ("many", "tools[0].fn: many takes *x: int, but a model gives arguments by name - name each parameter ("),
        ("weather", "tools[0].args.key: missing - 'weather' has no default for it - give one"),
        ("wether", "tools[0].fn: no function 'wether' in"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_when_it_is_bound(tool, name, said):
    with pytest.raises(RecipeError, match=re.escape(said)) as caught:
        tool(name)
    assert "\n" not in str(caught.value)


def test_unknown_arguments_of_the_recipe_are_refused(tool):
    with pytest.raises(RecipeError, match=re.escape("tools[0].args.dayz: 'weather' has no argument 'dayz'")):
        tool("weather", {"key": "k", "dayz": 3})


def test_a_lost_process_is_a_failure_of_its_call_alone(tool):
    hangs, dies, fine = tool("hangs", deadline=0.3), tool("dies"), tool("weather", {"key": "k"})
    (late,) = called(hangs, {})
    assert late.gone
    assert "0.3 s" in late.reason
    (dead,) = called(dies, {})
    assert dead.gone
    assert called(fine, {"city": "Oslo"})[0]["failed"] is False
