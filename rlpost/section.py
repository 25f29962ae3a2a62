"""The sections of a recipe: a key in YAML is a field of one, and nothing else is a key.

A section is a pydantic model: types are strict, unknown keys are refused, ranges stand in the field, and the text below
a field says what the key means.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

MISSING = "???"
"""A value that is still to be given."""
T = TypeVar("T")


class Choice(StrEnum):
    """Values to choose from, which YAML gives as text."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Text is taken for a member, in strict mode too."""
        return {**handler(source), "strict": False}


class Local:
    """Marks a key that names a local file or folder: relative ones are looked for beside the recipe."""


LocalPath = Annotated[str, Local()]


class Section(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        defer_build=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # of arguments, which may be any number
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, value: Any) -> Any:
        """A section given in part keeps the keys of its default: `{args: ...}` keeps the function's name."""
        if not isinstance(value, dict):
            return value
        kept = {key: keys for key, keys in set_by_default(cls).items() if isinstance(value.get(key), dict)}
        return {**value, **{key: {**keys, **value[key]} for key, keys in kept.items()}}

    def problems(self, where: str) -> Iterator[str]:  # noqa: ARG002 - for those that have some
        """What types and ranges cannot say is wrong with the section at key path `where`, in lines."""
        yield from ()


@cache
def set_by_default(section: type[Section]) -> dict[str, dict[str, Any]]:
    """What the defaults of keys that hold sections set: `{"loss": {"fn": "dpo"}}`."""
    factories = {key: info.default_factory for key, info in section.model_fields.items() if info.default_factory}
    defaults = {key: factory() for key, factory in factories.items()}  # type: ignore[call-arg]
    found = {k: x.model_dump(exclude_unset=True) for k, x in defaults.items() if isinstance(x, Section)}
    return {key: kept for key, kept in found.items() if kept}


def marked(info: FieldInfo, kind: type[T]) -> T | None:
    """The mark of that class on a field, as in `Annotated[Function, LOSS]`."""
    return next((mark for mark in info.metadata if isinstance(mark, kind)), None)


def join(where: str, key: object) -> str:
    """The full path of `key` below `where`; a number is a place in a list."""
    if isinstance(key, int):
        return f"{where}[{key}]"
    return f"{where}.{key}" if where else str(key)


def walk(value: Any, where: str = "") -> Iterator[tuple[str, Section]]:
    """Every section in `value` with its key path, outer ones first."""
    if isinstance(value, Section):
        yield where, value
        for name in type(value).model_fields:
            yield from walk(getattr(value, name), join(where, name))
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walk(inner, join(where, key))
