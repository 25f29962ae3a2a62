"""`rlpost sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli.as_text import print_result
from rlpost.cli.options import Json, Overrides, Recipe


def sweep(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs after all checks, and stop.")] = False,
    as_json: Json = False,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on with runs whose recipe has changed.")
    ] = False,
) -> None:
    """Run a recipe for all combinations: 'seed=1,2' 'n=range(1,4)'.

    Resumes what is unfinished. Prints the results' paths, best first.
    """
    from rlpost import sweep as sweeping

    combinations = sweeping.plan(recipe, overrides or [])
    sweeping.check(combinations)
    if dry_run:
        lines = [f"{c.path}: {c}" for c in combinations]
        print_result({"plan": lines} if as_json else "\n".join(lines))
        return
    outcomes = sweeping.sweep(combinations, allow_change)
    sweeping.show(outcomes)
    done = [outcome for outcome in outcomes if outcome.error is None]
    if as_json:
        print_result({"runs": [outcome.to_json() for outcome in outcomes]})
    elif done:
        print_result("\n".join(str(outcome.checkpoint) for outcome in done))
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if failed:
        raise typer.Exit(failed[0].exit_code)
