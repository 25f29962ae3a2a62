"""`rlpost goals infill`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli import options
from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import checkpoints
from rlpost.cli.importing import importing


def infill(
    forward: Annotated[
        str,
        typer.Argument(
            metavar="FORWARD",
            help="A run, a stage or checkpoint in it, or a model.",
            callback=home,
            autocompletion=checkpoints,
        ),
    ],
    reverse: Annotated[
        str,
        typer.Argument(
            metavar="REVERSE",
            help="A stage with direction: reverse, or its result.",
            callback=home,
            autocompletion=checkpoints,
        ),
    ],
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="How the text begins.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="How it ends.")],
    n: Annotated[int, typer.Option("--candidates", "-n", metavar="N", min=1, help="Samples of each model.")] = 16,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Of the longest middle.")
    ] = 32,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Print so many, best first.")] = 5,
    begin: Annotated[bool, typer.Option(help="FORWARD's texts began with the begin token.")] = True,
    as_json: options.Json = False,
) -> None:
    """Fill in what stands between two texts.

    A model searches from the beginning, one of reversed text from the end.
    """
    from rlpost import console

    with importing():
        from rlpost.goals import infill_text

    sampling = options.sampling_of(max_new_tokens=max_new_tokens, temperature=temperature)
    found, sampled = infill_text.infill_text(
        forward, reverse, before, after, n=n, sampling=sampling, seed=seed, begin=begin
    )
    rows = [(text, f"{m.forward:.3f}", f"{m.reverse:.3f}", f"{m.score:.3f}") for text, m in found[:top]]
    title = f"{len(found)} middles ranked, {sampled} tokens sampled"
    console.table(title, ["middle", "log p forward", "log p reverse", "sum"], rows)
    for text, m in found[:top]:
        print_result({"middle": text, "forward": m.forward, "reverse": m.reverse} if as_json else text)
