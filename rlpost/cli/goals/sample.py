"""`rlpost goals sample`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli import options
from rlpost.cli.arguments import home
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import checkpoints
from rlpost.cli.importing import importing
from rlpost.streams import from_stdin


def sample(
    checkpoint: options.Checkpoint,
    network: Annotated[
        str,
        typer.Option(
            "--network",
            metavar="V",
            help="A value network's stage or checkpoint.",
            callback=home,
            autocompletion=checkpoints,
        ),
    ],
    prompt: options.Prompt = None,
    goal: Annotated[
        list[str] | None, typer.Option("--goal", metavar="TEXT", help="End in this text; may be repeated.")
    ] = None,
    avoid: Annotated[
        list[str] | None, typer.Option("--avoid", metavar="TEXT", help="Never end in it; may be repeated.")
    ] = None,
    candidates: Annotated[
        int, typer.Option("--candidates", metavar="N", min=0, help="Likeliest tokens weighed; 0: all.")
    ] = 32,
    n: options.Many = 1,
    temperature: options.Temperature = 1.0,
    max_new_tokens: options.MaxNewTokens = 256,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    greedy: options.Greedy = False,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Complete a prompt toward endings, or away from them."""
    if bool(goal) == bool(avoid):
        raise typer.BadParameter("give either --goal or --avoid", param_hint="--goal")
    text = from_stdin("PROMPT") if prompt is None else prompt
    numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
    sampling = options.sampling_of(greedy, **numbers, top_p=top_p, min_p=min_p, stop=stop or [])
    with importing():
        from rlpost.goals.sample import guided_sample

    texts = guided_sample(
        checkpoint,
        text,
        network,
        goal or avoid or [],
        avoid=bool(avoid),
        candidates=candidates,
        sampling=sampling,
        n=n,
        seed=seed,
    )
    for completion in texts:
        print_result({"prompt": text, "completion": completion} if as_json else completion)
