"""Evaluates a single checkpoint: `rlpost eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import RecipeError
from rlpost.evaluate.evaluator import Result
from rlpost.evaluate.table import print_stages
from rlpost.inference.checkpoint import frozen_policy, join_ranks, judges_of, located, recipe_of
from rlpost.recipe.resolve import Resolved, resolve
from rlpost.run.lookup import newest_finished_run
from rlpost.stage_evaluation import evaluate_recipe


def evaluate_checkpoint(
    checkpoint: str | None, recipe: str | None, overrides: Sequence[str]
) -> tuple[list[str], Result, str]:
    """Evaluate a checkpoint by a recipe's `evaluation`; returns the prompts, the result, and the model evaluated.

    Args:
        checkpoint: a run, a stage, a checkpoint or a model; None for the newest finished run.
        recipe: a recipe by path or name; None for the one the checkpoint came from.
        overrides: `key=value` on it.

    Raises:
        RecipeError: no recipe is known, or it has no evaluation.
    """
    path, model, resolved = _evaluated_by(checkpoint, recipe, overrides)
    join_ranks(resolved, model)
    cfg = resolved.config.evaluation
    if cfg is None:
        raise RecipeError(f"{resolved.file}: it has no `evaluation`; name a recipe that has one with --recipe")
    policy = frozen_policy(model, resolved.config.model)
    prompts, result = evaluate_recipe(resolved, cfg, policy, judges_of(resolved, path if recipe is None else None))
    print_stages({_title(model): result.to_json()})
    return prompts, result, model


def processes_of(checkpoint: str | None, recipe: str | None, overrides: Sequence[str]) -> int:
    """How many processes the recipe asks for; arguments and errors are those of `evaluate_checkpoint`."""
    return _evaluated_by(checkpoint, recipe, overrides)[2].config.parallel.processes


def _evaluated_by(checkpoint: str | None, recipe: str | None, overrides: Sequence[str]) -> tuple[str, str, Resolved]:
    """What is evaluated, as it is named; where it is; and the recipe."""
    path = checkpoint or str(newest_finished_run(Path("runs")))
    model = located(path)
    return path, model, resolve(recipe or str(recipe_of(path)), overrides)


def sample_rows(prompts: Sequence[str], result: Result) -> Iterator[dict[str, Any]]:
    """One row an answer."""
    for answers in result.answers:
        yield from answers.rows(prompts)


def _title(model: str) -> str:
    parts = Path(model).parts
    return "/".join(parts[-3:-1]) if parts[-1] == "final" else model
