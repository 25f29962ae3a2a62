"""`rlpost goals calibrate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.options import Json


def calibrate(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A value network: its run's stage, or a checkpoint.", callback=home)
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
        typer.Option("--policy", metavar="MODEL", help="By default the model it was trained beside.", callback=home),
    ] = None,
    least: Annotated[float, typer.Option("--least", metavar="P", min=0, help="Rarer states are not followed.")] = 1e-5,
    as_json: Json = False,
) -> None:
    """Compare a value network with the truth.

    The truth is the sum over all likely completions of the prompts.
    """
    from rlpost.goals import calibration
    from rlpost.goals.value_network import read_settings
    from rlpost.run.lookup import find_checkpoint, parent_of

    folder = find_checkpoint(network) or Path(network)
    read_settings(folder)  # which says so if it is no value network, before one asks whose it is
    model = (find_checkpoint(policy) or Path(policy)) if policy else parent_of(folder)
    found = list(calibration.calibrations(folder, model, prompts, goal, max_new_tokens, least))
    if as_json:
        for asked in found:
            print_result(asdict(asked))
    else:
        calibration.print_table(found)
