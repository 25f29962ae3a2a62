"""`rlpost pairs`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.agreement import on_all
from rlpost.cli.arguments import home, target
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import recipes
from rlpost.cli.importing import importing
from rlpost.cli.launchers import on_ranks
from rlpost.cli.options import Checkpoint, Overrides


def pairs(
    checkpoint: Checkpoint,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Recipe with the prompts and the rewards.",
            callback=home,
            autocompletion=recipes,
        ),
    ],
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="The .jsonl file to write.", callback=target)],
    overrides: Overrides = None,
) -> None:
    """Write preference pairs from a model's own samples.

    Completions are ranked by a recipe's rewards.
    """
    from rlpost.recipe.resolve import resolve

    words = list(overrides or [])
    resolved = on_all(lambda: resolve(recipe, words))
    on_ranks(resolved.config.parallel.processes)
    with importing():
        from rlpost.inference import pairs as inference

    print_result(inference.write_pairs(checkpoint, recipe, out, words))
