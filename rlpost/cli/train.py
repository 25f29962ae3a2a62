"""`rlpost train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlpost.cli.as_text import print_result
from rlpost.cli.options import Json, Overrides, Recipe


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Json = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on with a run whose recipe has changed.")
    ] = False,
) -> None:
    """Run a recipe's stages, resuming what is unfinished.

    Prints the last checkpoint's path.
    """
    from rlpost.recipe.resolve import resolve

    resolved = resolve(recipe, overrides or [])
    from rlpost import pipeline

    if dry_run:
        lines = pipeline.dry_run(resolved)
        print_result({"plan": lines} if as_json else "\n".join(lines))
        return
    path = pipeline.train(resolved, allow_change)
    run = Path(resolved.config.runs) / resolved.config.run
    print_result({"checkpoint": str(path), "run": str(run)} if as_json else path)
