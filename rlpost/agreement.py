"""What ranks make sure of before they go on: that all of them can, and are about to do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from rlpost import ranks
from rlpost.errors import RecipeError, RlpostError

T = TypeVar("T")


def on_all(work: Callable[[], T]) -> T:
    """What `work` returned here, after it has come to its end on every rank; an error of one is raised by all.

    It is told whose it is, unless all have one.
    """
    if ranks.count() == 1:
        return work()
    found: list[T] = []

    def attempt() -> RlpostError | None:
        try:
            found.append(work())
        except RlpostError as error:
            return error
        return None

    errors = ranks.together(attempt)
    for number, error in enumerate(errors):
        if error is not None:
            if None in errors:
                error.args = (f"rank {number}: {error}", *error.args[1:])
            raise error
    return found[0]


def must_agree(what: Mapping[str, str]) -> None:
    """Refuse ranks that are about to do different things.

    Raises:
        RecipeError: one has another value of a name than the first rank.
    """
    first, *others = ranks.together(lambda: what)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                has = f"rank {number} has {name} {other.get(name)}, and rank 0 has {value}"
                raise RecipeError(f"{has} - start all ranks with the same")
