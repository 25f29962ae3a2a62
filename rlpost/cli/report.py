"""`rlpost report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlpost.cli.arguments import home, target
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import checkpoints


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.", autocompletion=checkpoints),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="The .html file; RUN/report.html by default.", callback=target),
    ] = None,
) -> None:
    """Write runs as one HTML file: curves, evaluation, settings.

    Several runs are drawn into the same curves. Prints the file's path.
    """
    from rlpost.report.page import write_report

    print_result(write_report([str(home(run)) for run in runs], Path(out) if out else None))
