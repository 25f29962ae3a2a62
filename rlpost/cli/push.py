"""`rlpost push`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli.as_text import print_result
from rlpost.cli.importing import importing
from rlpost.cli.options import Checkpoint


def push(
    checkpoint: Checkpoint,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the hub, like owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="For you alone.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Merge an adapter into its base first.")] = False,
) -> None:
    """Upload a checkpoint to the hub, with a model card."""
    with importing():
        from rlpost.inference import push as inference

    print_result(inference.push(checkpoint, repo, private=private, merged=merged))
