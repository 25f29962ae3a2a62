"""`rlpost serve`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from rlpost.cli.importing import importing
from rlpost.cli.options import Checkpoint


class Server(StrEnum):
    """Programs that serve a model."""

    transformers = "transformers"
    vllm = "vllm"


def serve(
    checkpoint: Checkpoint,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTION", help="Further options of the server, after `--`.")
    ] = None,
    engine: Annotated[
        Server, typer.Option("--engine", metavar="SERVER", help="transformers or vllm.")
    ] = Server.transformers,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="localhost, or 0.0.0.0 for all.")] = "localhost",
    port: Annotated[int, typer.Option("--port", metavar="PORT", min=1, max=65535)] = 8000,
) -> None:
    """Serve a model with OpenAI's interface.

    It runs transformers' or vLLM's own server; an adapter is merged into its base first.
    """
    with importing():
        from rlpost.inference import serve as inference

    inference.serve(checkpoint, engine, host, port, options or ())
