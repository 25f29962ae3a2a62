"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlpost.cli.arguments import home
from rlpost.cli.completion import checkpoints, recipes, settings

if TYPE_CHECKING:
    from rlpost.engine.params import Sampling

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A .yaml file, or the name of a packaged recipe.", autocompletion=recipes),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, like stages.grpo.group_size=16.", autocompletion=settings),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run, a stage or checkpoint in it, or a model.",
        callback=home,
        autocompletion=checkpoints,
    ),
]
Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="By default read from stdin.")]
OtherRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="RECIPE", help="Recipe to take settings from.", callback=home, autocompletion=recipes
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON.")]
Many = Annotated[int, typer.Option("--n", "-n", metavar="N", min=1, help="How many completions.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1)]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", min=0, help="0: all tokens.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P")]
MinP = Annotated[float, typer.Option("--min-p", metavar="P")]
Greedy = Annotated[bool, typer.Option("--greedy", help="The likeliest token, always.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends a completion; may be repeated.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0)]


def sampling_of(greedy: bool = False, **values: Any) -> Sampling:
    """The sampling parameters given on the command line; temperature 0 with `greedy`.

    Raises:
        typer.BadParameter: a value is out of range; the message names the option.
    """
    from rlpost.errors import RecipeError
    from rlpost.recipe.sampling import sampling_from

    try:
        return sampling_from(greedy, **values)
    except RecipeError as error:
        key, _, problem = str(error).partition(": ")
        raise typer.BadParameter(f"--{key.replace('_', '-')}: {problem}") from error
