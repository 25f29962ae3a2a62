"""`rlpost eval`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import figures, print_result
from rlpost.cli.completion import checkpoint_or_setting
from rlpost.cli.options import OtherRecipe, Overrides


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="By default the newest finished run.",
            callback=home,
            autocompletion=checkpoint_or_setting,
        ),
    ] = None,
    overrides: Overrides = None,
    recipe: OtherRecipe = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a line a sample, then the summary.")] = False,
) -> None:
    """Evaluate a checkpoint as its recipe says, or another."""
    words = list(overrides or [])
    if checkpoint is not None and re.match(r"[\w.\[\]-]+=", checkpoint) and not Path(checkpoint).exists():
        words.insert(0, checkpoint)
        checkpoint = None
    from rlpost.inference import evaluate as inference

    prompts, result, path = inference.evaluate_checkpoint(checkpoint, recipe, words)
    if as_json:
        for row in inference.sample_rows(prompts, result):
            print_result(row)
        print_result({"checkpoint": path, "summary": result.to_json()})
    else:
        print_result("\n".join(figures({"checkpoint": path, **result.to_json()})))
