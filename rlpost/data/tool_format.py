"""How a model writes tool calls: found in what its chat template renders, and proved before it is used.

A probe is rendered, and the JSON in it shows the form: an object with a name and arguments (Hermes, Qwen, Llama), a
list of such objects (Mistral), or a name before the arguments (newer Mistral, DeepSeek); with what stands around it. A
tokenizer with a `response_template` says itself how its model's turns are read, and transformers does that.

Calls of several kinds are then rendered and read back, also through the tokenizer: a template for which they are not
the same is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rlpost.data.chat import Template, text_of
from rlpost.data.templates import REMEDY, Job, Message, Rendered, Talk, render_all
from rlpost.data.tool_calls import Arguments, formed, wanted_form
from rlpost.data.tool_text import (
    END_OF_THOUGHT,
    JSON,
    BadCall,
    JsonFormat,
    Malformed,
    Shape,
    ToolCall,
    Turn,
    checked,
    flexible,
)
from rlpost.data.visible import visible
from rlpost.errors import DataError, ModelError

_WORD = "qxsaidqx"
_PLACE = "chat template"
UNREAD = "unreadable"
"""In messages, the name of a call that could not be read."""
_TYPES = {
    "text": "string",
    "count": "integer",
    "share": "number",
    "sure": "boolean",
    "items": "array",
    "inner": "object",
}
_PROPERTIES = {name: {"type": kind, "description": "d"} for name, kind in _TYPES.items()}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {"type": "object", "properties": _PROPERTIES, "required": ["text"]},
        },
    }
    for name in ("first_probe", "second_probe")
]
_FIRST, _SECOND = ToolCall("first_probe", {"text": "value"}), ToolCall("second_probe", {"text": "other"})
_CASES: list[list[ToolCall]] = [
    [_FIRST],
    [_SECOND],
    [ToolCall("second_probe", {"text": 'he said: "it\'s {x} [y]"', "count": 3})],
    [ToolCall("first_probe", {"text": "a\nb \\ c </t> žluť 漢字 🙂", "share": -2.5, "sure": True})],
    [ToolCall("first_probe", {"text": "x", "items": [1, "}", [], {"k": None}], "inner": {"a": {"b": "]"}, "c": {}}})],
]


class ToolFormat(Protocol):
    """The form of a model's calls."""

    def read(self, text: str) -> Turn:
        """A turn, which is all text if there is no call in it."""
        ...


def tool_format(tokenizer: Any, template: Template, tools: Sequence[Any]) -> ToolFormat:
    """The form of calls of `tools` (their schemas) in a chat template.

    Raises:
        ModelError: the template renders no calls, or calls that cannot be read back.
    """
    probes = _Probes(tokenizer, template)
    declared = getattr(tokenizer, "response_template", None)
    found = _Declared(tokenizer, probes.start, _TOOLS) if declared else _derived(probes)
    for calls in _CASES:
        probes.prove(found, calls)
    if probes.several:
        probes.prove(found, [call for calls in _CASES for call in calls])
    return replace(found, tools=tools) if isinstance(found, _Declared) else found


def wire_calls(calls: Sequence[ToolCall | BadCall], first: int = 0) -> list[dict[str, Any]]:
    """Calls as a message has them; `first` is the number of the first in its conversation."""
    made = []
    for number, call in enumerate(calls, start=first):
        name, arguments = (UNREAD, {"text": call.text}) if isinstance(call, BadCall) else (call.name, call.arguments)
        own = call.id if isinstance(call, ToolCall) else None
        made.append(
            {"id": own or call_id(number), "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return made


def call_id(number: int) -> str:
    """A call's id: nine letters and digits, as Mistral's templates ask for."""
    return f"call{number:05d}"


class _Probes:
    """Renderings of a template with calls."""

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._form = _form(tokenizer)
        first, two = self._talk([_FIRST]), self._talk([_FIRST, _SECOND])
        said = self._talk([_FIRST], _WORD)
        start, *rendered = self._rendered([Job(first, 1, True), Job(first, 2), Job(said, 2), Job(two, 2)])
        self.start = text_of(start, _PLACE, ModelError)
        one, *others = [self._turn(r) for r in rendered]
        if one is None or _FIRST.name not in one:
            raise _refusal(
                f"it {rendered[0].error}"
                if rendered[0].error
                else f"it writes no tool calls, or not in turns that end with {template.stop!r}"
            )
        self.one = one
        """The turn with one call, from the generation prompt to the stop token."""
        self.said, self.two = others
        """The same with some words, and with two calls; None where the template refuses that."""
        self.several = self.two is not None and self.two.count(_SECOND.name) == self.two.count(_FIRST.name) == 1

    def prove(self, found: ToolFormat, calls: Sequence[ToolCall]) -> None:
        """Refuse a form by which these calls are not read as they are rendered.

        Raises:
            ModelError: they are not.
        """
        (rendered,) = self._rendered([Job(self._talk(calls), 2)])
        turn = self._turn(rendered)
        if turn is None:
            raise _refusal(f"it {rendered.error or 'does not end a turn with calls as others'}")
        for text in (turn, self._retokenised(turn)):
            if text is not None and _json(found.read(text).calls) != _json(calls):
                raise _refusal(f"a call that it writes as {turn[:80]!r} cannot be read back")

    def _retokenised(self, text: str) -> str | None:
        """The text as the model would write it; None where the tokenizer has no token for a part of it."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        unknown = self._tokenizer.unk_token_id
        return (
            None if unknown is not None and unknown in ids else visible(ids, self._tokenizer, {self._template.stop_id})
        )

    def _talk(self, calls: Sequence[ToolCall], content: str = "") -> Talk:
        turn = {"role": "assistant", "content": content, "tool_calls": wire_calls(calls)}
        return formed(Talk([{"role": "user", "content": "a"}, turn], _TOOLS), self._form)

    def _rendered(self, jobs: Sequence[Job]) -> list[Rendered]:
        return render_all(self._tokenizer, jobs, _PLACE)

    def _turn(self, rendered: Rendered) -> str | None:
        text, stop = rendered.text, self._template.stop
        if rendered.error or not text.startswith(self.start) or stop not in text[len(self.start) :]:
            return None
        return text[len(self.start) : text.rindex(stop)]


def _form(tokenizer: Any) -> Arguments:
    turn: Message = {"role": "assistant", "content": "", "tool_calls": wire_calls([_FIRST])}
    try:
        return wanted_form(tokenizer, Talk([{"role": "user", "content": "a"}, turn], _TOOLS), _PLACE)
    except DataError as error:
        raise ModelError(str(error)) from error


def _json(calls: Sequence[ToolCall | BadCall]) -> str:
    """Calls, so that 1 and true are different."""
    return json.dumps([[c.name, c.arguments] if isinstance(c, ToolCall) else None for c in calls], sort_keys=True)


def _refusal(reason: str) -> ModelError:
    return ModelError(
        f"{_PLACE}: tools cannot be called by it: {reason}: {REMEDY} that writes calls as JSON, or give the tokenizer "
        "a response_template"
    )


def _derived(probes: _Probes) -> JsonFormat:
    """The form that the probes show.

    Raises:
        ModelError: there is no JSON in it that holds the call.
    """
    begin, end, shape = _shape(probes.one, _FIRST)
    lead = _lead(probes, begin)
    between = None
    if probes.several and probes.two is not None and not shape.is_list:
        first, second = _shape(probes.two, _FIRST), _shape(probes.two, _SECOND)
        between = flexible(probes.two[first[1] : second[0]])
    opening, closing = (flexible(literal) if literal.strip() else None for literal in (lead, probes.one[end:]))
    return JsonFormat(opening, shape, between, closing)


def _lead(probes: _Probes, begin: int) -> str:
    """What the template writes before a call because it is one: the same after nothing and after words."""
    lead = probes.one[:begin].rpartition(END_OF_THOUGHT)[2]
    if probes.said is None or _WORD not in probes.said:
        return lead
    after = probes.said[: _shape(probes.said, _FIRST)[0]].partition(_WORD)[2]
    while not after.endswith(lead):
        lead = lead[1:]
    return lead


def _shape(turn: str, call: ToolCall) -> tuple[int, int, Shape]:
    """Where the JSON of a call begins and ends in a rendered turn, and its shape."""
    for begin, end, value in _values(turn):
        is_list = isinstance(value, list)
        one = value[0] if isinstance(value, list) and value else value
        if call.arguments == one:
            at = turn.rfind(call.name, 0, begin)
            if at >= 0 and not is_list:
                return (
                    at,
                    end,
                    Shape(None, middle=re.compile(flexible(turn[at + len(call.name) : begin]).pattern + r"(?=\{)")),
                )
        name = next(_paths(one, call.name), None)
        arguments = next((p for p in _paths(one, call.arguments)), None) or next(
            (p for p, text in _texts(one) if _is_json_of(text, call.arguments)), None
        )
        if name is not None and arguments is not None:
            return begin, end, Shape(name, arguments, is_list)
    raise _refusal(f"it writes a call as {turn[:80]!r}, which is not JSON")


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """The JSON objects and lists in a text, outer ones first."""
    for match in re.finditer(r"[\[{]", text):
        try:
            value, end = JSON.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield match.start(), end, value


def _paths(value: Any, wanted: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if value == wanted:
        yield path
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, wanted, (*path, key))


def _texts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*path, key))


def _is_json_of(text: str, wanted: Any) -> bool:
    try:
        return bool(JSON.decode(text) == wanted)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class _Declared:
    """The form of a tokenizer's `response_template`, which transformers reads."""

    tokenizer: Any
    start: str
    """A prompt, which may begin the turn."""
    tools: Sequence[Any]
    """Schemas, by which arguments that are no JSON get their types."""

    def read(self, text: str) -> Turn:
        """A turn."""
        try:
            message = self.tokenizer.parse_response(text, prefix=self.start, tools=list(self.tools))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return Turn("", (BadCall(" ".join(str(error).split())[:200], text.strip()),))
        calls = list[ToolCall | BadCall]()
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            try:
                calls.append(checked(function.get("name"), function.get("arguments")))
            except Malformed as wrong:
                calls.append(BadCall(str(wrong), json.dumps(call, default=str)))
        content = message.get("content")
        return Turn(content.strip() if isinstance(content, str) else "", tuple(calls))
