"""`rlpost sample`."""

from __future__ import annotations

from typing import Annotated

import typer

from rlpost.cli import options
from rlpost.cli.arguments import columns, home
from rlpost.cli.as_text import print_result
from rlpost.cli.completion import checkpoints
from rlpost.cli.importing import importing
from rlpost.streams import from_stdin


def _moved(given: list[str] | None) -> None:
    if given:
        raise typer.BadParameter(
            "are now options of `rlpost goals sample CHECKPOINT PROMPT --network V`",
            param_hint="--guide, --goal, --avoid, --candidates",
        )


_BestOf = Annotated[
    int | None,
    typer.Option("--best-of", metavar="N", min=2, help="Best of N by --recipe's rewards, or --judge."),
]
_Example = Annotated[
    list[str] | None,
    typer.Option("--example", metavar="COLUMN=TEXT", help="For rewards that read a row; may be repeated."),
]
_Judge = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="MODEL", help="A reward model or a reverse model.", callback=home, autocompletion=checkpoints
    ),
]
_Engine = Annotated[
    str | None,
    typer.Option("--engine", metavar="FILE:FUNCTION", help="What samples; by default --recipe's engine."),
]
_Moved = Annotated[
    list[str] | None,
    typer.Option("--guide", "--goal", "--avoid", "--candidates", hidden=True, callback=_moved),
]


def sample(
    checkpoint: options.Checkpoint,
    prompt: options.Prompt = None,
    n: options.Many = 1,
    temperature: options.Temperature = 1.0,
    max_new_tokens: options.MaxNewTokens = 256,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    greedy: options.Greedy = False,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    best_of: _BestOf = None,
    recipe: options.OtherRecipe = None,
    example: _Example = None,
    judge: _Judge = None,
    engine: _Engine = None,
    moved: _Moved = None,  # noqa: ARG001 - refused by its callback
    as_json: options.Json = False,
) -> None:
    """Complete a prompt; a reverse model writes what precedes it."""
    _must_fit(best_of, recipe, example, judge)
    text = from_stdin("PROMPT") if prompt is None else prompt
    sampling = options.sampling_of(
        greedy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=stop or [],
    )
    row = columns(example or [], "--example")
    with importing():
        from rlpost.inference import sample as inference

    texts = inference.sample(
        checkpoint,
        text,
        sampling=sampling,
        n=n,
        seed=seed,
        best_of=best_of,
        recipe=recipe,
        example=row,
        judge=judge,
        engine=engine,
    )
    for completion in texts:
        print_result({"prompt": text, "completion": completion} if as_json else completion)


def _must_fit(best_of: int | None, recipe: str | None, example: list[str] | None, judge: str | None) -> None:
    """Raise BadParameter where an option needs another that is missing."""
    if best_of is not None and (recipe is None) == (judge is None):
        raise typer.BadParameter(
            "needs either --recipe, whose rewards choose the best, or --judge", param_hint="--best-of"
        )
    if best_of is None and judge is not None:
        raise typer.BadParameter("chooses among several: give --best-of too", param_hint="--judge")
    if example and recipe is None:
        raise typer.BadParameter("is what the rewards of --recipe read: give that too", param_hint="--example")
