"""`rlpost eval`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rlpost.agreement import on_all
from rlpost.cli.arguments import home
from rlpost.cli.as_text import figures, print_result
from rlpost.cli.completion import checkpoint_or_setting
from rlpost.cli.importing import importing
from rlpost.cli.launchers import on_ranks, refuse_several_processes
from rlpost.cli.options import OtherRecipe, Overrides


class Harness(StrEnum):
    """Programs that bring their own tasks."""

    lm_eval = "lm_eval"


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="By default the newest finished run.",
            callback=home,
            autocompletion=checkpoint_or_setting,
        ),
    ] = None,
    overrides: Overrides = None,
    recipe: OtherRecipe = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a line a sample, then the summary.")] = False,
    harness: Annotated[
        Harness | None,
        typer.Option("--harness", metavar="lm_eval", help="Score tasks of lm-eval, not the recipe's evaluation."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="FILE", help="With --harness: a task file or a folder; may be repeated."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With --harness: ask through the chat template.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="With --harness: the first N rows of a task.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", min=1, help="With --harness; 16 by default.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="With --harness: of few-shot examples, samples.")
    ] = None,
    trust_tasks: Annotated[
        bool, typer.Option("--trust-tasks", help="With --harness: task files may run Python and load any data.")
    ] = False,
) -> None:
    """Evaluate a checkpoint by its recipe, or by lm-eval tasks."""
    words = list(overrides or [])
    if checkpoint is not None and re.match(r"[\w.\[\]-]+=", checkpoint) and not Path(checkpoint).exists():
        words.insert(0, checkpoint)
        checkpoint = None
    given: dict[str, Any] = {
        "tasks": tasks,
        "chat": chat or None,
        "limit": limit,
        "batch_size": batch_size,
        "seed": seed,
        "trusted": trust_tasks or None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if harness is not None:
        _by_harness(checkpoint, recipe, words, as_json, **options)
    elif options:
        option = "trust-tasks" if "trusted" in options else next(iter(options)).replace("_", "-")
        raise typer.BadParameter(f"--{option}: only with --harness lm_eval")
    else:
        _by_recipe(checkpoint, recipe, words, as_json)


def _by_recipe(checkpoint: str | None, recipe: str | None, words: list[str], as_json: bool) -> None:
    with importing():
        from rlpost.inference import evaluate as inference

    on_ranks(on_all(lambda: inference.processes_of(checkpoint, recipe, words)))
    prompts, result, path = inference.evaluate_checkpoint(checkpoint, recipe, words)
    if as_json:
        for row in inference.sample_rows(prompts, result):
            print_result(row)
        print_result({"checkpoint": path, "summary": result.to_json()})
    else:
        print_result("\n".join(figures({"checkpoint": path, **result.to_json()})))


def _by_harness(
    checkpoint: str | None,
    recipe: str | None,
    words: list[str],
    as_json: bool,
    *,
    tasks: Sequence[str] = (),
    trusted: bool = False,
    **options: Any,
) -> None:
    refuse_several_processes(os.environ)
    if not tasks:
        raise typer.BadParameter("--harness: needs --tasks FILE, a task file of lm-eval or a folder of them")
    from rlpost.evaluate.task_files import read_task_files

    files = read_task_files([str(home(name)) for name in tasks], trusted)
    with importing():  # torch, only when the files are in order
        from rlpost.inference import harness as inference

    chosen = inference.HarnessOptions(trusted=trusted, **options)
    result, path = inference.evaluate_harness(checkpoint, recipe, words, files, chosen)
    if as_json:
        for row in result.rows:
            print_result(row)
        print_result({"checkpoint": path, "summary": result.to_json()})
    else:
        print_result("\n".join(figures({"checkpoint": path, **result.to_json()})))
