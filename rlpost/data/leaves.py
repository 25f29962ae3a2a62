"""The values of a conversation that a template should render, and conversations with some of them changed.

Example: {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]} has
three: `tool_calls[0].function.name`, the name of the argument `x`, and its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

from rlpost.data.templates import Talk

Path = tuple[str | int, ...]
"""("messages", 1, "tool_calls", 0, "function", "name")."""


class Sort(StrEnum):
    """How a value can be changed to find it in the rendered text."""

    words = auto()
    """Text: by a word appended to it."""
    chosen = auto()
    """A name that the row chose, of an argument or a parameter: likewise."""
    fixed = auto()
    """A number, a boolean, or a keyword: only by another value."""


@dataclass(frozen=True)
class Leaf:
    """One value of a conversation."""

    path: Path
    value: Any
    sort: Sort


_OF_MESSAGES = {"role", "id", "tool_call_id"}
_OF_CALLS = {"id", "type", "index"}
_OF_TOOLS = {"strict", "additionalProperties", "$schema"}
"""Keys without content for a model."""


def leaves(talk: Talk) -> list[Leaf]:
    """All values of a conversation with content for a model."""
    return [*_leaves(talk.messages, ("messages",)), *_leaves(talk.tools, ("tools",))]


def changed(talk: Talk, changes: Mapping[Path, Any], names: Mapping[Path, str]) -> Talk:
    """The conversation with other values at the paths of `changes`, and other names for the keys of `names`."""

    def copy(value: Any, path: Path) -> Any:
        if path in changes:
            return changes[path]
        if isinstance(value, Mapping):
            return {names.get((*path, k), k): copy(v, (*path, k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, (*path, i)) for i, item in enumerate(value)]
        return value

    return Talk(copy(talk.messages, ("messages",)), copy(talk.tools, ("tools",)))


def kind_of(leaf: Leaf, messages: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """A key that leaves which a template treats alike share: the path without numbers and chosen names."""
    kind: list[Any] = []
    for i, step in enumerate(leaf.path):
        if kind and kind[-1] == "arguments":
            break
        chosen = isinstance(step, int) or leaf.path[i - 1] == "properties"
        kind.append(messages[step]["role"] if i == 1 and kind[0] == "messages" else "*" if chosen else step)  # type: ignore[index]
    return (*kind, leaf.sort, type(leaf.value).__name__, leaf.value if isinstance(leaf.value, str) else None)


def location_of(leaf: Leaf, messages: Sequence[Mapping[str, Any]]) -> str:
    """The leaf in words: "message 2's tool_calls[0].function.name"."""
    root, *rest = leaf.path
    head, steps = str(root), rest
    if root == "messages":
        number = int(rest[0])
        head, steps = f"message {number + 1} ({messages[number]['role']}): its ", rest[1:]
    text = head
    for step in steps:
        text += f"[{step}]" if isinstance(step, int) else str(step) if text.endswith(" ") else f".{step}"
    return text


def _leaves(value: Any, path: Path) -> Iterator[Leaf]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if _has_no_content(path, key, item):
                continue
            if path[-1] in ("arguments", "properties"):
                yield Leaf((*path, key), key, Sort.chosen)
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i))
    elif isinstance(value, str):
        if value.strip():
            keyword = path[0] == "tools" and path[-1] in ("type", "$ref")
            yield Leaf(path, value, Sort.fixed if keyword else Sort.words)
    elif value is not None:
        yield Leaf(path, value, Sort.fixed)


def _has_no_content(path: Path, key: str, value: Any) -> bool:
    if path[0] == "messages":
        if len(path) == 2:
            return key in _OF_MESSAGES
        return len(path) == 4 and path[2] == "tool_calls" and key in _OF_CALLS
    if key == "type" and (len(path) == 2 or value == "object"):
        return True
    return key in _OF_TOOLS and path[-1] != "properties"
