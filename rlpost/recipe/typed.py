"""Plain trees to dataclasses and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from rlpost.recipe.keys import TRUE, Keys, fields_of, join, shape
from rlpost.recipe.schema import Recipe


def filled(keys: Keys) -> dict[str, Any]:
    """The tree of `keys`, a checked one, with defaults where it says nothing, in the schema's order."""
    whole = _fill(keys, Recipe, keys.tree, Recipe(), "")
    assert isinstance(whole, dict)
    return whole


def _fill(keys: Keys, annotation: Any, value: Any, default: Any, where: str) -> Any:
    found = shape(annotation)
    if is_dataclass(found.base) and isinstance(value, dict):
        base = default if is_dataclass(default) else found.base()  # type: ignore[operator]
        full = {name: plain(getattr(base, name)) for name in fields_of(found.base)}  # type: ignore[arg-type]
        for name, inner in value.items():
            expected = keys.child(where, name, annotation)
            full[name] = _fill(keys, expected, inner, getattr(base, name), join(where, name))
        return full
    if isinstance(value, dict) and (found.items or where == "stages"):
        return {k: _fill(keys, keys.child(where, k, annotation), v, None, join(where, k)) for k, v in value.items()}
    if isinstance(value, list) and found.items:
        return [_fill(keys, found.items[0], v, None, join(where, i)) for i, v in enumerate(value)]
    return value


def build(keys: Keys) -> Recipe:
    """The tree of `keys`, filled, checked and without references, as dataclasses."""
    recipe = _build(keys, Recipe, keys.tree, "")
    assert isinstance(recipe, Recipe)
    return recipe


def _build(keys: Keys, annotation: Any, value: Any, where: str) -> Any:
    found = shape(annotation)
    if value is None:
        return None
    if is_dataclass(found.base) and isinstance(found.base, type):
        given = {n: _build(keys, keys.child(where, n, annotation), v, join(where, n)) for n, v in value.items()}
        return found.base(**given)
    if isinstance(value, dict):
        return {k: _build(keys, keys.child(where, k, annotation), v, join(where, k)) for k, v in value.items()}
    if isinstance(value, list):
        items = [_build(keys, keys.child(where, i, annotation), v, join(where, i)) for i, v in enumerate(value)]
        return tuple(items) if found.base is tuple else items
    return value if found.base is Any else _scalar(found.base, value)


def _scalar(base: Any, value: Any) -> Any:
    """A checked value as its type: a command line's words come as text."""
    if base is bool:
        return value if isinstance(value, bool) else str(value).lower() in TRUE
    return base(value)


def plain(value: Any) -> Any:
    """Dataclasses as mappings, members of enums as their values, tuples as lists."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value
