"""A function that a recipe names, ready to be called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rlpost.console import Spell
from rlpost.errors import RecipeError


@dataclass(frozen=True)
class Bound:
    """A function with its recipe's arguments applied."""

    call: Callable[..., Any]
    name: str
    """The function's name, without module or file."""
    where: str = ""
    """Its key path in the recipe: `stages.grpo.rewards[0]`."""
    file: Path | None = None
    """The user's file it comes from; None for functions of rlpost."""
    sha256: str | None = None
    """sha256 of that file as it was loaded."""
    unscored: bool = False
    """Completions it fails on are unscored; else a failure stops the run."""
    failing: Spell = field(default_factory=Spell, compare=False)
    """Whether its last calls failed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with what the program supplies.

        Raises:
            RecipeError: it is one of rlpost's, and refuses an argument that the recipe gives it.
        """
        try:
            return self.call(*args, **kwargs)
        except ValueError as error:
            if self.file is None and (given := self._named_in(str(error))):
                raise RecipeError(f"{self.where}.args.{given}: {self.name} refuses it: {error}") from error
            raise

    def _named_in(self, text: str) -> str | None:
        """The first of the recipe's arguments that a text names, with its value."""
        given = self.call.keywords if isinstance(self.call, partial) else {}
        return next((n for n, value in given.items() if re.search(rf"\b{n}\b", text) and str(value) in text), None)

    @property
    def __signature__(self) -> inspect.Signature:
        """The remaining parameters, for `inspect.signature`: their names say what a function takes."""
        return inspect.signature(self.call)
