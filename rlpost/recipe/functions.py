"""The functions that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlpost.recipe.schema import Recipe
from rlpost.usercode.binding import bind, functions_in
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import Function, Lookup
from rlpost.usercode.signatures import paths_in


def functions_of(recipe: Recipe) -> Iterator[tuple[Function, Lookup, str]]:
    """The functions of all but disabled stages, each with where it is looked up and its key path."""
    for where, section in recipe.sections():
        yield from functions_in(section, where)


def files_given(recipe: Recipe) -> Iterator[str]:
    """The local files that are arguments of these functions."""
    for function, lookup, _ in functions_of(recipe):
        yield from (function.args[name] for name in paths_in(function, lookup))


def bind_all(recipe: Recipe, base: Path) -> list[Bound]:
    """Bind every function of the enabled stages and the evaluation, before anything loads.

    Raises:
        RecipeError: as `bind`.
    """
    return [bind(function, lookup, where, base) for function, lookup, where in functions_of(recipe)]
