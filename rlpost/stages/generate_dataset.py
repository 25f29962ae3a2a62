"""The loop of the stages that write a dataset: some prompts at a time, with a progress bar, until a signal arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlpost import console
from rlpost.errors import Interrupted
from rlpost.stages.context import Context
from rlpost.types import Group

Row = dict[str, Any]


def generate_dataset(
    context: Context, prompts: Sequence[Group], at_once: int, make: Callable[[Sequence[Group], int], Iterable[Row]]
) -> list[Row]:
    """The rows made from all prompts, in order; prints how many there are.

    Args:
        context: of the stage.
        prompts: all of them.
        at_once: prompts a call of `make` is given.
        make: (some prompts, index of the first of them) -> their rows.

    Raises:
        Interrupted: a signal asked to stop.
    """
    rows: list[Row] = []
    with console.Progress(context.name, len(prompts)) as progress:
        for first in range(0, len(prompts), at_once):
            some = prompts[first : first + at_once]
            rows += make(some, first)
            progress.advance(n=len(some))
            if (signal := context.interrupts.agreed()) is not None:
                raise Interrupted(
                    f"{context.name} stopped while it sampled, and keeps nothing; run the same command to begin again",
                    signal,
                )
    console.say(f"{context.name}: {len(rows)} rows from {len(prompts)} prompts")
    return rows
