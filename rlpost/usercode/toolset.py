"""The tools that a section of a recipe names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.section import Section
from rlpost.usercode.binding import bind, functions_at
from rlpost.usercode.bound import Bound
from rlpost.usercode.calls import Remote
from rlpost.usercode.params import ToolFunction
from rlpost.usercode.tools import ToolHere


@dataclass(frozen=True)
class Tool:
    """A tool with its recipe's arguments applied."""

    bound: Bound
    """Called with `arguments`, an object; in its file's process, or in this one."""
    schema: dict[str, Any]
    """What a model is told of it."""
    max_result: int
    """Most characters of a result."""

    @property
    def name(self) -> str:
        """What a model calls it."""
        return self.bound.name


def bound_tools(section: Section, where: str, base: Path) -> list[Tool]:
    """The tools of a section at a key path; none of one that has no such key.

    Raises:
        RecipeError: as `bind`.
    """
    if not getattr(section, "tools", None):
        return []
    found = []
    for function, lookup, place in functions_at(section, "tools", where):
        assert isinstance(function, ToolFunction)
        bound = bind(function, lookup, place, base)
        assert isinstance(bound.call, Remote | ToolHere)
        found.append(Tool(bound, bound.call.schema(), function.max_result))
    return found
