"""What the keys of a recipe are: types, defaults and ranges from the sections' classes, descriptions from their source.

For scripts/recipe_docs.py and scripts/recipe_schema.py; a run needs none of it.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import rlpost
from rlpost.recipe.kinds import kinds, spec_of
from rlpost.recipe.schema import Recipe
from rlpost.section import Choice, Section


@dataclass(frozen=True)
class Key:
    """A key of a section."""

    name: str
    type: Any
    """As annotated, without None."""
    optional: bool
    """It may be null."""
    info: FieldInfo
    marks: tuple[Any, ...]
    """What annotates it, or the numbers in it: limits, and where functions or files are looked up."""
    description: str

    @property
    def required(self) -> bool:
        """A recipe has to give it."""
        return self.info.is_required()

    @property
    def default(self) -> Any:
        """Its value where a recipe says nothing, as plain data; of a section, what differs from its own defaults."""
        value = self.info.get_default(call_default_factory=True)
        if value is PydanticUndefined:
            raise ValueError(f"{self.name} has no default")
        if isinstance(value, Section):
            return value.model_dump(mode="json", exclude_defaults=True)
        return list(value) if isinstance(value, tuple) else value.value if isinstance(value, Choice) else value

    def bound(self, name: str) -> float | None:
        """Its `gt`, `ge`, `lt` or `le`; of a list or tuple, that of its numbers."""
        return next((getattr(mark, name) for mark in self.marks if hasattr(mark, name)), None)

    def marked(self, kind: type) -> Any:
        """The mark of that class on it, or None."""
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)


def keys_of(section: type[Section]) -> list[Key]:
    """All keys of a section, those of its bases first."""
    found = []
    for name, info in section.model_fields.items():
        plain, marks = _unmarked(info.annotation)
        bare, optional = _without_none(plain)
        found.append(Key(name, bare, optional, info, (*info.metadata, *marks), _description(section, name)))
    return found


def own_keys(section: type[Section]) -> list[Key]:
    """The keys that a section adds to those of its bases, or says otherwise; a kind that it merely sets is none."""
    inherited = {name for base in bases(section) for name in base.model_fields}
    own = inspect.get_annotations(section)
    return [k for k in keys_of(section) if k.name in own and not (k.name == "kind" and "kind" in inherited)]


def bases(section: type[Section]) -> list[type[Section]]:
    """The sections whose keys it takes over."""
    return [base for base in section.__bases__ if issubclass(base, Section) and base is not Section]


def inner(annotation: Any) -> Iterator[Any]:
    """The classes in an annotation: of `dict[str, Source] | None` they are str, Source and NoneType."""
    arguments = get_args(annotation)
    if isinstance(annotation, type) and not arguments:
        yield annotation
    for argument in arguments:
        yield from inner(argument)


def sections() -> list[type[Section]]:
    """Every section of a recipe: those of the top, the kinds of stages, and what these have in them."""
    found: dict[type[Section], None] = {}

    def add(section: type[Section]) -> None:
        for base in bases(section):
            add(base)
        found.setdefault(section)

    def add_all_below(section: type[Section]) -> None:
        for cls in (cls for key in keys_of(section) for cls in inner(key.type) if issubclass(cls, Section)):
            if cls not in found:
                add(cls)
                add_all_below(cls)

    stages = [spec_of(kind) for kind in kinds()]
    add(Recipe)
    add_all_below(Recipe)
    for stage in stages:
        add(stage)
    for stage in stages:
        add_all_below(stage)
    return list(found)


def choices(choice: type[Choice]) -> dict[str, str]:
    """What there is to choose from, with descriptions."""
    texts = _texts(Path(inspect.getfile(choice)))
    return {member.value: texts.get(f"{choice.__name__}.{member.name}", "") for member in choice}


def summary(described: Any) -> str:
    """A class's or a function's docstring in one line."""
    return _one_line(described.__doc__ or "")


def _unmarked(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without the marks in it, and these: `list[Annotated[int, Field(ge=1)]]` is `list[int]` and Ge(1)."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found = (m for mark in arguments[1:] for m in (mark.metadata if isinstance(mark, FieldInfo) else (mark,)))
        return arguments[0], tuple(found)
    if origin not in (list, tuple, dict):
        return annotation, ()
    parts = [_unmarked(argument) for argument in arguments]
    return origin[tuple(part for part, _ in parts)], tuple(dict.fromkeys(mark for _, marks in parts for mark in marks))


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    rest = [a for a in get_args(annotation) if a is not NoneType]
    if len(rest) != 1:
        raise TypeError(f"{annotation}: a key is of one type, which may be null")
    return rest[0], True


def _description(section: type[Section], name: str) -> str:
    """The text below the field, in the first class that has one."""
    for cls in section.__mro__:
        if issubclass(cls, Section) and cls is not Section:
            text = _texts(Path(inspect.getfile(cls))).get(f"{cls.__name__}.{name}")
            if text:
                return text
    return ""


@cache
def _texts(file: Path) -> dict[str, str]:
    """`Class.name` -> the text below that line of the class, of every class at the top of a file."""
    found = {}
    for cls in ast.parse(file.read_text("utf-8")).body:
        for line, below in zip(cls.body, cls.body[1:], strict=False) if isinstance(cls, ast.ClassDef) else ():
            target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
            if isinstance(target, ast.Name) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[f"{cls.name}.{target.id}"] = _one_line(str(below.value.value))
    return found


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def write(file: Path, text: str) -> None:
    """Write a generated file of this tree, from the package of this tree."""
    root = Path(__file__).parents[1]
    if Path(rlpost.__file__).parents[1] != root:
        sys.exit(f"rlpost is imported from {Path(rlpost.__file__).parent}: run this with PYTHONPATH={root}")
    file.write_text(text, "utf-8")
    print(file)
