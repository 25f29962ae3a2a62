"""`rlpost list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.options import Json


def list_(
    runs: Annotated[str, typer.Option("--runs", metavar="FOLDER", help="The folder of runs.", callback=home)] = "runs",
    as_json: Json = False,
) -> None:
    """List packaged recipes, models, trackers and runs."""
    from rlpost.recipe.files import GROUPS, choices, describe, listing
    from rlpost.run.layout import list_runs

    if runs != "runs" and not Path(runs).is_dir():
        raise typer.BadParameter(f"{runs} is not a folder", param_hint="--runs")
    recipes = [(recipe.name, recipe.description) for recipe in listing()]
    chosen = {
        group: [(f"{group}={name}", describe(file)) for name, file in choices(group, Path()).items()]
        for group in GROUPS
    }
    found = [
        (str(run.path), ", ".join(f"{k} {v}".strip() for k, v in run.stages.items())) for run in list_runs(Path(runs))
    ]
    if as_json:
        print_result(
            {
                "recipes": dict(recipes),
                "models": dict(chosen["model"]),
                "logging": dict(chosen["logging"]),
                "runs": dict(found),
            }
        )
        return
    groups = (("models", chosen["model"]), ("trackers", chosen["logging"]))
    for title, lines in (("recipes", recipes), *groups, (f"runs in {runs}/", found)):
        width = max((len(name) for name, _ in lines), default=0)
        print_result(f"{title}:")
        print_result("\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in lines) or "  none")
