"""A recipe's keys and their possible values, for completion, read from the shipped JSON Schema and the recipe's files.

Nothing is composed or validated: completion must be quick, and must work on a recipe that is not finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

Node = dict[str, Any]
"""A part of the JSON Schema."""


class Keys:
    """The keys that a recipe sets or could set."""

    def __init__(self, schema: Node, tree: Mapping[str, Any], groups: Mapping[str, Iterable[str]]) -> None:
        """Prepare.

        Args:
            schema: the JSON Schema of recipes.
            tree: the recipe's merged files, unresolved.
            groups: for each section that can be chosen by name, the names to choose from.
        """
        self._schema = schema
        self._tree = tree
        self._groups = {section: list(names) for section, names in groups.items()}

    def candidates(self, word: str) -> list[tuple[str, str]]:
        """The completions of `word`, an unfinished `key` or `key=value`, each with its description.

        An unfinished completion (`stages.`, `seed=`) never comes alone: the next level comes with it, or the shell
        would add a space after it.
        """
        key, equals, start = word.partition("=")
        if equals:
            return [(f"{key}={value}", text) for value, text in self.values(key) if value.startswith(start)]
        found = [(name, text) for name, text in self._keys(word) if name.startswith(word)]
        if len(found) != 1:
            return found
        inside = self.candidates(found[0][0])
        return [*found, *inside] if found[0][0].endswith("=") else inside or found

    def values(self, key: str) -> list[tuple[str, str]]:
        """Values for a key: its choices, or else its current or default value; `null` where that is allowed."""
        if key in self._groups:
            return [(name, f"a {key} that ships, or lies beside the recipe") for name in self._groups[key]]
        nodes, value = self._at(_parts(key))
        found = dict(_choices(nodes))
        if not found and value is not None and not isinstance(value, dict | list) and _TYPED.fullmatch(str(value)):
            found[_text(value)] = "as it is"
        elif not found and value is None:
            found |= {default: "the default" for node in nodes if (default := _default(node))}
        if any(node.get("type") == "null" for node in nodes):
            found.setdefault("null", "none")
        return list(found.items())

    def takes_path(self, key: str) -> bool:
        """Whether the key's value is a local file or folder."""
        return any(node.get("format") == "path" for node in self._at(_parts(key))[0])

    def _keys(self, word: str) -> list[tuple[str, str]]:
        """All keys of the section that `word` is in, as full paths with what follows them (`.` or `=`)."""
        head = word[: word.rfind(".") + 1]
        nodes, value = self._at(_parts(head))
        found: dict[str, str] = {}
        for name in self._below(nodes, value):
            if f"{head}{name}" == "defaults":
                continue  # is for files alone
            inner, inside = self._at([*_parts(head), name])
            about = next((str(n["description"]) for n in inner if "description" in n), "")
            for ending in [*_endings(inner, inside), *("=" if self._groups.get(f"{head}{name}") else "")]:
                found.setdefault(f"{head}{name}{ending}", about.partition("\n")[0])
        return list(found.items())

    def _below(self, nodes: Sequence[Node], value: Any) -> list[str]:
        """The keys of a section, those that the recipe sets first."""
        known = [name for node in nodes for name in node.get("properties", {})]
        given = [str(name) for name in value] if isinstance(value, dict) else []
        return [name for name in dict.fromkeys([*given, *known]) if _NAME.fullmatch(name)]

    def _at(self, parts: Sequence[str]) -> tuple[list[Node], Any]:
        """The schema nodes that describe a key, and the recipe's value there."""
        nodes, value = self._alternatives(self._schema, self._tree), self._tree
        for part in parts:
            inside = _inside(value, part)
            below = [child for node in nodes for child in _children(node, part, inside is not None)]
            value = inside
            nodes = [found for child in below for found in self._alternatives(child, value)]
        return nodes, value

    def _alternatives(self, node: Node, value: Any) -> list[Node]:
        """The node with its `$ref`, `anyOf`, `oneOf`, `allOf` and `if` branches expanded, where they fit `value`."""
        if not isinstance(node, dict):
            return []
        found = [node]
        if isinstance(ref := node.get("$ref"), str):
            found += self._alternatives(self._schema["$defs"][ref.rpartition("/")[2]], value)
        for choice in ("anyOf", "oneOf", "allOf"):
            fitting = [inner for inner in node.get(choice, []) if self._fits(inner, value)]
            for inner in fitting:
                found += self._alternatives(inner, value)
        if "if" in node:
            found += self._alternatives(node.get("then" if self._fits(node["if"], value) else "else", {}), value)
        return found

    def _fits(self, node: Node, value: Any) -> bool:
        """Whether the node can describe `value`: no constant of the node contradicts it."""
        if isinstance(ref := node.get("$ref"), str):
            node = self._schema["$defs"][ref.rpartition("/")[2]]
        if isinstance(value, dict) and not value.keys().isdisjoint(node.get("not", {}).get("required", ())):
            return False
        for name, wanted in node.get("properties", {}).items():
            given = value.get(name) if isinstance(value, dict) else None
            if "const" in wanted and given is not None and given != wanted["const"]:
                return False
        return True


_NAME = re.compile(r"[\w-]+")
_TYPED = re.compile(r"[\w./+-]+")
"""Values that need no quotes in a shell."""


@cache
def _split(key: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[.\[\]]+", key) if part)


def _parts(key: str) -> list[str]:
    return list(_split(key))


def _inside(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
        return value[int(part)]
    return None


def _children(node: Node, part: str, given: bool) -> Iterator[Node]:
    """The node of one key; of a named entry (a stage, a source) only if the recipe has it, since overrides add none."""
    if part in node.get("properties", {}):
        yield node["properties"][part]
    elif given and isinstance(node.get("additionalProperties"), dict):
        yield node["additionalProperties"]
    elif given and part.isdecimal() and isinstance(node.get("items"), dict):
        yield node["items"]


def _endings(nodes: Sequence[Node], value: Any) -> list[str]:
    """What follows a key: `.` for a section, `.0.` for the first entry of a list of sections, `=` for a value."""
    if isinstance(value, str) and "${" in value:
        return ["="]  # what is a reference is replaced as a whole
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [f".{i}." for i in range(len(value))]
    section = isinstance(value, dict) or any(node.get("properties") for node in nodes)
    return ["."] if section else ["="]


def _choices(nodes: Sequence[Node]) -> Iterator[tuple[str, str]]:
    for node in nodes:
        for value, text in zip_longest(node.get("enum", []), node.get("markdownEnumDescriptions", []), fillvalue=""):
            yield _text(value), str(text)
        if "const" in node:
            yield _text(node["const"]), str(node.get("description", ""))
        if node.get("type") == "boolean":
            yield from (("true", ""), ("false", ""))


def _default(node: Node) -> str:
    """The default that a key's description names, if it needs no quotes."""
    match = re.search(r"Default: `(.+?)`\.", str(node.get("description", "")))
    return match[1] if match and _TYPED.fullmatch(match[1]) else ""


def _text(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def merged(parts: Iterable[tuple[Mapping[str, Any], str | None]]) -> dict[str, Any]:
    """Merge a recipe's chain of files, later ones over earlier ones; references stay unresolved.

    Args:
        parts: each file's contents, and for a group's file the section that it replaces.
    """
    found: dict[str, Any] = {}
    for part, group in parts:
        found.pop(group or "", None)
        _merge(found, part)
    return found


def _merge(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict):
            inside = old.get(key)
            old[key] = dict(inside) if isinstance(inside, dict) else {}
            _merge(old[key], value)
        else:
            old[key] = value
