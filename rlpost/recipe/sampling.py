"""Builds sampling parameters that no recipe gives: those of the command line and of Python callers."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from rlpost.engine.params import Sampling
from rlpost.errors import RecipeError
from rlpost.recipe.build import range_of


def sampling_from(greedy: bool = False, **values: Any) -> Sampling:
    """The sampling parameters with these values; temperature 0 with `greedy`.

    Raises:
        RecipeError: a value is out of range, as `KEY: expected from 0 to 1, got 2`.
    """
    try:
        sampling = Sampling(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        expected = range_of(Sampling.model_fields[key])
        raise RecipeError(f"{key}: expected {expected}, got {first['input']!r}") from error
    if "" in sampling.stop:
        raise RecipeError("stop: an empty text stops every completion at once - remove it")
    return sampling.model_copy(update={"temperature": 0.0}) if greedy else sampling
