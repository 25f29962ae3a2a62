"""`rlpost verify`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from rlpost.cli.as_text import print_result
from rlpost.cli.importing import importing
from rlpost.cli.options import Json


class Proof(StrEnum):
    """What is proved."""

    objectives = "objectives"
    goals = "goals"


def verify(
    what: Annotated[
        Proof,
        typer.Argument(metavar="objectives|goals", help="By default the objectives; or goals and guided decoding."),
    ] = Proof.objectives,
    vocab: Annotated[int, typer.Option("--vocab", metavar="N", min=2, help="Tokens, the end token among them.")] = 3,
    depth: Annotated[int, typer.Option("--depth", metavar="N", min=2, help="Tokens of the longest completion.")] = 3,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of tree, policy and rewards.")] = 0,
    as_json: Json = False,
) -> None:
    """Prove the objectives on a token tree that can be summed over.

    Exits with 1 if something that must be exact is not.
    """
    with importing():
        from rlpost.goals.verify import verify_goals
        from rlpost.oracle.verify import verify as verify_objectives

    prove = verify_goals if what is Proof.goals else verify_objectives
    report = prove(vocab, depth, seed)
    print_result(report.to_json() if as_json else report.text())
    if not report.ok:
        raise typer.Exit(1)
