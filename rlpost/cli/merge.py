"""`rlpost merge`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.importing import importing
from rlpost.cli.options import Checkpoint


class Dtype(StrEnum):
    """Precisions of written weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def merge(
    checkpoint: Checkpoint,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write, which must be new.", callback=home)],
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; by default the base's."),
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Print llama.cpp's command that converts OUT, in place of OUT.")
    ] = False,
) -> None:
    """Write a checkpoint as one model folder, adapters merged."""
    with importing():
        from rlpost.inference import merge as inference

    print_result(inference.merge_checkpoint(checkpoint, out, dtype, gguf=gguf))
