"""`rlpost train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlpost.agreement import on_all
from rlpost.cli.as_text import print_result
from rlpost.cli.importing import importing
from rlpost.cli.launchers import on_ranks
from rlpost.cli.options import Json, Overrides, Recipe

if TYPE_CHECKING:
    from rlpost.recipe.resolve import Resolved


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", min=1, help="A smoke run: every stage cut to N steps, as run NAME-N-steps."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Json = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on with a run whose recipe has changed.")
    ] = False,
) -> None:
    """Run a recipe's stages, resuming what is unfinished.

    Prints the last checkpoint's path.
    """
    resolved = on_all(lambda: _resolved(recipe, overrides or [], steps))
    if not dry_run:
        on_ranks(resolved.config.parallel.processes)
    with importing():
        from rlpost import pipeline

    if dry_run:
        lines = pipeline.dry_run(resolved)
        print_result({"plan": lines} if as_json else "\n".join(lines))
        return
    path = pipeline.train(resolved, allow_change)
    run = Path(resolved.config.runs) / resolved.config.run
    print_result({"checkpoint": str(path), "run": str(run)} if as_json else path)


def _resolved(recipe: str, overrides: list[str], steps: int | None) -> Resolved:
    if steps is None:
        from rlpost.recipe.resolve import resolve

        return resolve(recipe, overrides)
    from rlpost.smoke import resolve_smoke

    return resolve_smoke(recipe, overrides, steps)
