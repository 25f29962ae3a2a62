"""The form that a chat template needs for the arguments of tool calls: an object, or JSON text.

With the other form, a template fails, quotes JSON inside JSON, or writes Python's `{'city': 'Oslo'}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from rlpost.data.templates import REMEDY, Job, Message, Talk, render_all
from rlpost.errors import DataError


class Arguments(StrEnum):
    """The form of a tool call's arguments."""

    object = "object"
    text = "text"


def formed(talk: Talk, form: Arguments) -> Talk:
    """The conversation with its tool calls' arguments, which are objects, in this form."""
    if form is Arguments.object or not _has_calls(talk.messages):
        return talk
    return Talk([_as_text(message) for message in talk.messages], talk.tools)


def wanted_form(tokenizer: Any, talk: Talk, location: str) -> Arguments:
    """The form that the template renders as JSON, found by rendering a sample; objects if both work.

    Raises:
        DataError: neither works.
    """
    if not _has_calls(talk.messages):
        return Arguments.object
    source = tokenizer.get_chat_template(tools=talk.tools) if tokenizer.chat_template else ""
    key = (source, talk.tools is not None)
    if key not in _FOUND:
        _FOUND[key] = _probe(tokenizer, talk.tools is not None, location)
    found = _FOUND[key]
    if found is None:
        raise DataError(
            f"{location}: the chat template writes the arguments of a tool call neither from an object nor from text "
            f"as JSON: {REMEDY}"
        )
    return found


_FOUND: dict[tuple[str, bool], Arguments | None] = {}


def _probe(tokenizer: Any, with_tools: bool, location: str) -> Arguments | None:
    user = {"role": "user", "content": "a"}
    call = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {"key": "value"}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    schema = {"type": "object", "properties": {"key": {"type": "string", "description": "d"}}, "required": ["key"]}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    talk = Talk([user, turn], [tool] if with_tools else None)
    jobs = [Job(formed(talk, form), 2) for form in Arguments]
    as_object, as_text = render_all(tokenizer, jobs, location)
    if not as_object.error and "{'key'" not in as_object.text:
        return Arguments.object
    if not as_text.error and '\\"key' not in as_text.text:
        return Arguments.text
    # A template that fails on both refuses tool calls, which rendering the row itself reports.
    return Arguments.object if as_object.error and as_text.error else None


def _has_calls(messages: Sequence[Message]) -> bool:
    return any(message.get("tool_calls") for message in messages)


def _as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call_as_text(call) for call in calls]} if calls else message


def _call_as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    if not isinstance(function.get("arguments"), Mapping):
        return call
    written = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written
