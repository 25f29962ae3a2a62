"""`rlpost import-gguf`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.importing import importing


def import_gguf(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A model as a GGUF file.", callback=home)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write, which must be new.", callback=home)],
) -> None:
    """Write a GGUF file as a model folder to train from."""
    with importing():
        from rlpost.inference import import_gguf as inference

    print_result(inference.import_gguf(file, out))
