"""`rlpost.train`: a recipe's stages, from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.api.run import Run
from rlpost.errors import RecipeError
from rlpost.recipe.overrides import written
from rlpost.recipe.resolve import resolve


def train(
    recipe: str | os.PathLike[str],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    steps: int | None = None,
    allow_change: bool = False,
) -> Run:
    """Run a recipe's stages, resuming what is unfinished, as `rlpost train` does.

    Progress goes to stderr. Ctrl-C ends it after the step, with a checkpoint; the same call goes on from there.

    Args:
        recipe: a path, or the name of a packaged recipe.
        overrides: `["stages.sft.steps=100"]` or `{"stages.sft.steps": 100}`.
        steps: a smoke run: every stage cut to so many steps, as run NAME-N-steps.
        allow_change: go on with a run whose recipe has changed.

    Raises:
        RlpostError: any of its kinds, in one line; nothing exits.
    """
    words = as_words(overrides)
    if steps is None:
        resolved = resolve(os.fspath(recipe), words)
    elif steps < 1:
        raise RecipeError(f"steps: expected at least 1, got {steps}")
    else:
        from rlpost.smoke import resolve_smoke

        resolved = resolve_smoke(os.fspath(recipe), words, steps)
    from rlpost import pipeline
    from rlpost.usercode.process import end_all

    try:
        pipeline.train(resolved, allow_change)
    finally:
        end_all()
    return Run(Path(resolved.config.runs) / resolved.config.run)


def as_words(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """The overrides as `key=value` words.

    Raises:
        RecipeError: one is no text, or its value cannot be written as an override.
    """
    if isinstance(overrides, str):
        raise RecipeError(f"overrides: {overrides!r} is one text - give a list, [{overrides!r}]")
    if not isinstance(overrides, Mapping):
        wrong = [word for word in overrides if not isinstance(word, str)]
        if wrong:
            raise RecipeError(f"overrides: {wrong[0]!r} is no text like 'seed=1' - give texts, or a dict")
        return list(overrides)
    words = {key: written(key, value) for key, value in overrides.items()}
    for key, word in words.items():
        if word is None:
            raise RecipeError(f"{key}: {overrides[key]!r} cannot be given as an override - put it into a recipe")
    return [word for word in words.values() if word is not None]
