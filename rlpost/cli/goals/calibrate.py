"""`rlpost goals calibrate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import checkpoints
from rlpost.cli.importing import importing
from rlpost.cli.options import Json


def calibrate(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help="A value network: its run's stage, or a checkpoint.",
            callback=home,
            autocompletion=checkpoints,
        ),
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Whose completions are enumerated.")],
    goal: Annotated[
        list[str], typer.Option("--goal", metavar="TEXT", help="Ending that it is asked about; may be repeated.")
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="As it was trained with.")
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="MODEL",
            help="By default the model it was trained for.",
            callback=home,
            autocompletion=checkpoints,
        ),
    ] = None,
    least: Annotated[float, typer.Option("--least", metavar="P", min=0, help="Rarer states are not followed.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Compare a value network with the truth.

    The truth is the sum over all likely completions of the prompts.
    """
    with importing():
        from rlpost.goals.calibration import calibrations, print_table

    found = list(calibrations(network, prompts, goal, depth=max_new_tokens, policy=policy, least=least))
    if as_json:
        for result in found:
            print_result(asdict(result))
    else:
        print_table(found)
