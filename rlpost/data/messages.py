"""Conversations in rows: messages, tool calls and tools, checked and normalised."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
MARKS = ("weight", "train")
"""Keys of a message that say whether it is trained: OpenAI's `weight: 0`, and `train: false`."""

SYSTEM = ("system", "system_prompt")
"""Columns that hold a system message."""

Message = dict[str, Any]


def opening(messages: Sequence[Message]) -> Sequence[Message]:
    """A conversation without the assistant turn it ends with, if any."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def question(row: Mapping[str, Any]) -> str | None:
    """The content of the last user message of a row's conversation; None if it has none."""
    for column in ("prompt", "messages"):
        messages = row.get(column)
        if not isinstance(messages, list | tuple):
            continue
        questions = [m.get("content") for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
        if questions and isinstance(questions[-1], str):
            return questions[-1]
    return None


def is_trained(message: Mapping[str, Any]) -> bool:
    """Whether it is an assistant's message that is not marked as untrained."""
    marks = (message.get(mark) for mark in MARKS)
    return message["role"] == "assistant" and all(mark is None or mark for mark in marks)


def without_marks(messages: Sequence[Message]) -> list[Message]:
    """The messages without the keys that say what is trained, as a chat template gets them."""
    return [{k: v for k, v in message.items() if k not in MARKS} for message in messages]


def validate(messages: Any, location: str) -> list[Message]:
    """The messages with their roles, contents and tool calls checked; keys that are null are left out.

    Arguments of tool calls become objects; JSON text is parsed.

    Raises:
        DataError: not a list of messages, an unknown role, a content that is missing or no text, a tool call without
            a name or with unreadable arguments.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{location}: messages must be a list of at least one {{role, content}}")
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"{location}: message {number}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(f"{where} has no role: a message is {{role, content}}")
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"{where}: role {role!r:.40} is none of {', '.join(ROLES)}")
        where = f"{where} ({role})"
        content = message.get("content")
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            raise DataError(f"{where}: its content is {_kind(content)}")
        if role == "assistant" and not (content and content.strip()) and not calls:
            raise DataError(f"{where}: its content is empty")
        _check_marks(message, where)
        kept = {str(k): v for k, v in message.items() if v is not None} | {"content": content or ""}
        if "tool_calls" in kept:
            kept["tool_calls"] = _calls(kept["tool_calls"], where)
        checked.append(kept)
    return checked


def tools_of(row: Mapping[str, Any], location: str) -> list[Any] | None:
    """The row's tools, from objects or JSON text; None if it has none.

    Raises:
        DataError: they are neither.
    """
    given = row.get("tools")
    if isinstance(given, str):
        given = _json(given, f"{location}: 'tools'") if given.strip() else None
    given = [given] if isinstance(given, Mapping) else given
    if given is None:
        return None
    if not isinstance(given, list | tuple):
        raise DataError(f"{location}: 'tools' is {_type(given)}; give a list of objects, or the same as JSON")
    read = [_json(tool, f"{location}: tools[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(given)]
    for i, tool in enumerate(read):
        if not isinstance(tool, Mapping):
            raise DataError(
                f"{location}: tools[{i}] is {_type(tool)}, not an object with name, description, parameters"
            )
    return read or None


def without_nulls(value: Any) -> Any:
    """Messages and tools without the nulls of Arrow, whose struct columns have every key of any row.

    Only in lists of messages and of tools: in other values a null may have a meaning.
    """
    if isinstance(value, list | tuple) and any(_is_message_or_tool(item) for item in value):
        return _stripped(value)
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _is_message_or_tool(item: Any) -> bool:
    return isinstance(item, Mapping) and (
        "role" in item or "function" in item or {"from", "value"} <= set(item) or {"name", "parameters"} <= set(item)
    )


def _stripped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _stripped(v) for k, v in value.items() if v is not None}
    return [_stripped(item) for item in value] if isinstance(value, list | tuple) else value


def _check_marks(message: Mapping[str, Any], where: str) -> None:
    for mark in MARKS:
        given = message.get(mark)
        if given is None:
            continue
        if not isinstance(given, bool | int | float) or given not in (0, 1):
            raise DataError(f"{where}: its {mark} is {given!r:.40}; a turn is trained (1, true) or not (0, false)")
        if given and message["role"] != "assistant":
            raise DataError(f"{where}: its {mark} is {given!r}, but only turns of the assistant can be trained")


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise DataError(f"{where}: its tool_calls are {_type(calls)}, not a list")
    read = []
    for i, call in enumerate(calls):
        location = f"{where}: tool_calls[{i}]"
        call = {str(k): v for k, v in call.items() if v is not None} if isinstance(call, Mapping) else {}
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{location} names no function: a call is {{function: {{name, arguments}}}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{location}: its arguments")
        if not isinstance(arguments, Mapping | None):
            raise DataError(f"{location}: its arguments are {_type(arguments)}, not an object")
        named = dict(function) if arguments is None else {**function, "arguments": dict(arguments)}
        read.append({**call, "function": named} if "function" in call else named)
    return read


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {text!r:.60} is not JSON ({error})") from error


def _kind(content: Any) -> str:
    if content is None:
        return "missing"
    if isinstance(content, list | tuple):
        return "a list of parts, not text: only text is trained; join the parts' texts with a `map`"
    return f"{_type(content)}, not text"


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__
