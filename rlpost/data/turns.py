"""Conversations as data sets spell them, made into messages {role, content}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.data.messages import ROLES, SYSTEM, Message
from rlpost.errors import DataError

SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Names of speakers -> roles of messages; upper and lower case are the same."""
_CALL = "function_call"
_KEYS = (("from", "role"), ("value", "content"))
_HEADS = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def is_turns(value: Any) -> bool:
    """Whether it is a list of turns with a `from`, or with roles like `human`; or the JSON text of a list."""
    if isinstance(value, str):
        return value.lstrip().startswith("[")
    first = value[0] if isinstance(value, list | tuple) and value else None
    if not isinstance(first, Mapping):
        return False
    role = first.get("role")
    if role is None:
        return first.get("from") is not None
    return isinstance(role, str) and role not in ROLES and role.strip().lower() in SPEAKERS


def quoted_messages(value: Any) -> list[Any] | None:
    """The list of messages or turns that a text is the JSON of; None if it is anything else."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    are_turns = all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in found)
    return found if are_turns else None


def turns(value: Any, location: str) -> list[Message]:
    """The messages of a list of turns {from, value} or {role, content}, or of JSON text of one.

    Raises:
        DataError: a turn has no speaker or no text, or two, or an unknown speaker.
    """
    value = from_json(value, location)
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{location} is {_kind(value)}, not a list of turns {{from, value}}")
    return [_message(turn, f"{location}: message {i}") for i, turn in enumerate(value, start=1)]


def dialogue(text: Any, location: str) -> list[Message]:
    """The messages of a text like "\\n\\nHuman: Hi\\n\\nAssistant: Hello".

    Raises:
        DataError: it does not begin so, or does not end with an answer.
    """
    if not is_dialogue(text):
        raise DataError(f"{location}: it does not begin with 'Human:', as the first row does")
    _, *pieces = _HEADS.split(text)
    messages = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    check_order(messages, location)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise DataError(f"{location}: it does not end with an answer after 'Assistant:'")
    return messages


def is_dialogue(text: Any) -> bool:
    """Whether it is a text that begins with "Human:"."""
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def with_system(messages: list[Message], row: Mapping[str, Any], location: str) -> list[Message]:
    """The messages after what the row's `system` or `system_prompt` says, if anything.

    Raises:
        DataError: it is not text, or the messages begin with another system message.
    """
    given = {c: row[c] for c in SYSTEM if row.get(c) not in (None, "")}
    if not given:
        return messages
    column, text = next(iter(given.items()))
    if not isinstance(text, str):
        raise DataError(f"{location}: {column!r} is {_kind(text)}, not text")
    own = [m["content"] for m in messages if m["role"] == "system"]
    others = [other for other in (*given.values(), *own) if other != text]
    if others:
        where = "the conversation" if own else "'system_prompt'"
        raise DataError(f"{location}: {column!r} and {where} each have a system message: keep one of them")
    return messages if own else [{"role": "system", "content": text}, *messages]


def past(value: Any, location: str) -> list[Message]:
    """The messages of a `history`: pairs of a question and its answer.

    Raises:
        DataError: it is something else.
    """
    value = from_json(value, location)
    if value in (None, "", [], ()):
        return []
    messages = []
    for i, pair in enumerate(value if isinstance(value, list | tuple) else [value]):
        texts = list(pair) if isinstance(pair, list | tuple) else []
        if len(texts) != 2 or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"{location}[{i}] is {pair!r:.40}, not a pair of texts: [question, answer]")
        messages += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    return messages


def check_order(messages: Sequence[Message], location: str) -> None:
    """Check that the user speaks first and that user and assistant take turns; tools may answer between.

    Raises:
        DataError: they do not.
    """
    before = None
    for i, message in enumerate(messages, start=1):
        role = message["role"]
        if role in ("system", "developer"):
            continue
        if before is None and role != "user":
            raise DataError(f"{location}: the first turn is the {role}'s, not the user's: take it out")
        if role == before and role != "tool":
            raise DataError(f"{location}: message {i} is a second turn of the {role} in a row: join the two")
        before = role


def from_json(value: Any, location: str) -> Any:
    """The list in a text that begins with a bracket; other values as they are.

    Raises:
        DataError: it is not JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not JSON ({error})") from error


def _message(turn: Any, location: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{location} is {_kind(turn)}, not a turn {{from, value}}")
    found = []
    for names in _KEYS:
        given = [name for name in names if turn.get(name) is not None]
        if len(given) == 2:
            raise DataError(f"{location} has both {' and '.join(names)}: keep one of them")
        if not given and not (names[1] == "content" and turn.get("tool_calls")):
            raise DataError(f"{location} has neither {' nor '.join(names)}")
        found.append(given[0] if given else names[1])
    speaker, said = found
    name = turn[speaker]
    role = SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{location}: {speaker!r} is {name!r:.40}, none of {', '.join(SPEAKERS)}")
    rest = {str(k): v for k, v in turn.items() if k not in (speaker, said) and v is not None}
    if name.strip().lower() == _CALL:
        return {"role": role, "content": "", "tool_calls": _calls(turn.get(said), location), **rest}
    return {"role": role, "content": turn.get(said), **rest}


def _calls(text: Any, location: str) -> list[dict[str, Any]]:
    """The tool calls that a turn of `function_call` holds as JSON."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: its function_call is not JSON ({error})") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"{location}: its function_call is no {{name, arguments}}, nor a list of them")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
