"""`rlpost show`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli.as_text import show_yaml
from rlpost.cli.options import Overrides, Recipe
from rlpost.results import emit


def show(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=0, help="Also N rows as the model sees them.")] = 0,
) -> None:
    """Print a recipe with everything filled in.

    What is still to be given is `???`.
    """
    from rlpost import console
    from rlpost.recipe.resolve import resolve

    resolved = resolve(recipe, overrides or [], lenient=not rows)
    for warning in resolved.warnings:
        console.warn(warning)
    if resolved.missing:
        console.warn(f"still to be given: {', '.join(resolved.missing)}")
    lines: list[str] = []
    if rows:
        from rlpost.cli import shown

        lines = shown.show_rows(resolved, rows)
    show_yaml(resolved.to_yaml().removesuffix("\n"))
    for line in lines:
        emit(line)
