"""`rlpost compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import checkpoints
from rlpost.cli.importing import importing
from rlpost.cli.options import Json, OtherRecipe


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="A run, checkpoint or model.", callback=home, autocompletion=checkpoints)
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", help="The one compared with A.", callback=home, autocompletion=checkpoints)
    ],
    recipe: OtherRecipe = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints on the same prompts.

    Says whether the difference is within noise: exact tests, corrected for their number.
    """
    with importing():
        from rlpost.inference.compare import compare_checkpoints, conclusion, print_comparison

    comparisons, models = compare_checkpoints(a, b, recipe)
    print_comparison(comparisons)
    if as_json:
        print_result({"a": models[0], "b": models[1], "comparisons": [c.to_json() for c in comparisons]})
    else:
        print_result("\n".join(map(conclusion, comparisons)))
