"""`rlpost goals plot`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rlpost.cli.arguments import home, picture
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import checkpoints
from rlpost.cli.importing import importing


class Picture(StrEnum):
    """What is drawn."""

    maze = "maze"


def plot(
    what: Annotated[Picture, typer.Argument(metavar="maze", help="The kind of picture.")],  # noqa: ARG001 - there is one so far
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The folder of a finished run.", callback=home, autocompletion=checkpoints),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="The .png file; RUN/maze.png by default.", callback=picture),
    ] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="STAGE", help="Whose policy; the last one by default.")
    ] = None,
    mazes: Annotated[int, typer.Option("--mazes", metavar="N", min=1, help="How many are drawn.")] = 3,
) -> None:
    """Draw what a run knows of its mazes beside the exact solution.

    Prints the picture's path.
    """
    with importing():
        from rlpost.goals.maze_plot import plot_mazes

    print_result(plot_mazes(Path(run), Path(out) if out else None, stage, mazes))
