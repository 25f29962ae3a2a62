"""`rlpost doctor`."""

from __future__ import annotations

import typer

from rlpost.cli.as_text import print_result
from rlpost.cli.options import Json


def doctor(as_json: Json = False) -> None:
    """Say what is installed and what this machine offers.

    Exits with 1 if something that rlpost needs is missing.
    """
    from rlpost.inference.machine import examine, text

    machine = examine()
    print_result(machine.to_json() if as_json else text(machine))
    if machine.problems:
        raise typer.Exit(1)
