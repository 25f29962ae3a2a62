"""All dataclasses of a configuration, by key path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from rlpost.recipe.keys import join


def walk(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass in `value` with its key path, outer ones first."""
    if is_dataclass(value):
        yield where, value
        for f in fields(value):
            yield from walk(getattr(value, f.name), join(where, f.name))
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walk(inner, join(where, key))
