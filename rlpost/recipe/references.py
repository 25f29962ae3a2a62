"""Fills in the references `${key}` of a recipe.

Only keys are allowed, since the value of `${oc.env:TOKEN}` would be saved with the run. Their total size is limited,
since a kilobyte of variables that name each other twice would fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlpost.errors import RecipeError
from rlpost.section import MISSING, join
from rlpost.suggest import hint, shortened

MOST = 1_000_000
"""Most characters that all references of a recipe may produce together; each counts its text and COST more."""
COST = 50
LONGEST = 20_000
"""Most characters of a value that has references."""
DEEPEST = 5
"""Most levels of references inside one another, as in `${vars.${vars.name}}`."""
_TOKEN = re.compile(r"\\\$\{|\$\{|\}")


def is_reference(value: object) -> bool:
    """Whether a value holds a reference, like `${vars.x}`."""
    return isinstance(value, str) and "${" in value


def check(tree: Any) -> None:
    """Refuse every reference that is not a plain `${key}`, before any is filled in.

    Raises:
        RecipeError: a value names a resolver, is too long, is not closed, or has too many references in one another.
    """
    for where, text in _references(tree, ""):
        _expand(text, where, lambda _: "_")


def escaped(value: Any) -> Any:
    """The tree as it would be written in a recipe: a literal `${` becomes `\\${`."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


@dataclass
class Filled:
    """A tree without references."""

    tree: dict[str, Any]
    origins: dict[str, str]
    """For each missing value, by key path, the key path at which to give it."""
    unknown: list[str]
    """Messages about references to nothing. They are raised last: a misspelt key may be the cause, and is reported
    first."""


def fill(tree: dict[str, Any]) -> Filled:
    """The tree with every reference filled in.

    Raises:
        RecipeError: a reference leads back to itself, or all of them amount to too much.
    """
    filling = _Filling(tree)
    return Filled(filling.value(tree, ""), filling.missing, filling.unknown)


def _references(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _references(inner, join(where, key))
    elif is_reference(value):
        yield where, value


def _expand(text: str, where: str, value_of: Callable[[str], Any]) -> Any:
    """Replace each reference by `value_of(name)`; a text that is one reference becomes that value itself."""
    if len(text) > LONGEST:
        raise RecipeError(f"{where}: a value with references and more than {LONGEST} characters - put it into a file")
    if _is_unclosed(text):
        raise RecipeError(f"{where}: a reference is not closed - write ${{key}}, or \\${{ for the two characters")
    parts: list[list[Any]] = [[]]  # of the text, and of each reference that is open
    at = 0
    for token in _TOKEN.finditer(text):
        parts[-1].append(text[at : token.start()])
        at = token.end()
        if token[0] == "\\${":
            parts[-1].append("${")
        elif token[0] == "${":
            parts.append([])
            if len(parts) > DEEPEST + 1:
                raise RecipeError(
                    f"{where}: references more than {DEEPEST} deep inside one another - name the value itself"
                )
        elif len(parts) == 1:
            parts[-1].append("}")
        else:
            name = _joined(parts.pop(), where)
            if ":" in name:
                env = "only names of environment variables go into recipes"
                raise RecipeError(
                    f"{where}: {shortened(repr(text))} is refused - {env if 'env' in name else 'only ${key} is known'}"
                )
            parts[-1].append(value_of(name.strip()))
    parts[-1].append(text[at:])
    given = [part for part in parts[0] if part != ""]
    return given[0] if len(given) == 1 else _joined(given, where)


def _is_unclosed(text: str) -> bool:
    depth = 0
    for token in _TOKEN.findall(text):
        depth = max(depth + {"${": 1, "}": -1}.get(token, 0), 0)
    return depth > 0


def _joined(parts: list[Any], where: str) -> str:
    if MISSING in parts:
        return MISSING
    if any(isinstance(part, dict | list) for part in parts):
        raise RecipeError(f"{where}: a reference inside text names a list or a mapping - name a single value")
    return "".join(map(str, parts))


class _Filling:
    """One tree being filled in; each referenced value is computed once."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        self._known: dict[str, Any] = {}
        self._open: list[str] = []
        self._spent = 0
        self.missing: dict[str, str] = {}
        self.unknown: list[str] = []

    def value(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {key: self.value(inner, join(where, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner, join(where, i)) for i, inner in enumerate(value)]
        if value == MISSING:
            self.missing[where] = where
        if not is_reference(value):
            return value
        if where in self._open:
            circle = " -> ".join([*self._open[self._open.index(where) :], where][:6])
            raise RecipeError(f"{where}: refers to itself ({circle}) - give one of them a value")
        self._open.append(where)
        found = _expand(value, where, lambda name: self._at(name, where))
        self._open.pop()
        return found

    def _at(self, name: str, where: str) -> Any:
        """The filled-in value of a key; a relative key (`${.x}`) starts at the mapping around `where`."""
        dots = len(name) - len(name.lstrip("."))
        parts = re.split(r"[.\[]", where)
        around = parts[:-dots] if dots else []
        node, full = self._tree, ""
        for part in [p.removesuffix("]") for p in around] + re.split(r"[.\[]", name[dots:].replace("]", "")):
            inner: Any = None
            if isinstance(node, dict) and part in node:
                inner, full = node[part], join(full, part)
            elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                inner, full = node[int(part)], join(full, int(part))
            elif name == MISSING:
                return MISSING
            else:
                near = hint(name, _paths(self._tree, ""))
                self.unknown.append(f"{where}: nothing is called {name!r} in the recipe{near}")
                return MISSING
            node = inner
        if full not in self._known:
            self._known[full] = self.value(node, full)
        found = self._known[full]
        if found == MISSING:
            self.missing[where] = self.missing.get(full, full)
        elif isinstance(found, dict | list):
            below = [key for key in self.missing if key.startswith((f"{full}.", f"{full}["))]
            self.missing |= {where + key[len(full) :]: self.missing[key] for key in below}
        self._spend(found, where)
        return found

    def _spend(self, found: Any, where: str) -> None:
        left = [found]
        self._spent += COST
        while left and self._spent <= MOST:
            value = left.pop()
            self._spent += 1 if isinstance(value, dict | list) else len(str(value))
            left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if self._spent > MOST:
            raise RecipeError(
                f"{where}: references amount to more than {MOST} characters - let variables repeat each other less"
            )


def _paths(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield join(where, key)
            yield from _paths(inner, join(where, key))
