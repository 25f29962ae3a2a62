"""`rlpost rollouts`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.completion import checkpoints
from rlpost.results import emit


def rollouts(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run, a stage in it, or a .jsonl file.", callback=home, autocompletion=checkpoints
        ),
    ],
    step: Annotated[int | None, typer.Option("--step", metavar="N", min=1, help="The newest by default.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", metavar="N", min=1, help="How many prompts.")] = 2,
    every: Annotated[bool, typer.Option("--all", help="All completions, not just the best and the worst.")] = False,
) -> None:
    """Print saved rollouts, turn by turn, with rewards.

    Stages save them every `table_every` steps.
    """
    from rlpost.report.rollouts import read_rollouts, shown

    for line in shown(read_rollouts(run, step), n, every):
        emit(line)
