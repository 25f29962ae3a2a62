"""What a recipe's key says beside its type and its default: `prompts: int = key(32, ge=1)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

MISSING: Any = "???"
"""What OmegaConf takes for a value that is not there; omegaconf itself takes long to import."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes; infinity and NaN never belong to it."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __contains__(self, value: float) -> bool:
        over = (self.gt is None or value > self.gt) and (self.ge is None or value >= self.ge)
        under = (self.lt is None or value < self.lt) and (self.le is None or value <= self.le)
        return over and under and math.isfinite(value)

    def __str__(self) -> str:
        low = self.ge if self.gt is None else self.gt
        high = self.le if self.lt is None else self.lt
        if low is None:
            return "a finite number"
        if high is None:
            return f"at least {low:g}" if self.gt is None else f"more than {low:g}"
        exclusive = [" (exclusive)" * (end is not None) for end in (self.gt, self.lt)]
        return f"from {low:g}{exclusive[0]} to {high:g}{exclusive[1]}"


def key(
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    lookup: Any = None,
    path: bool = False,
) -> Any:
    """A key of a recipe.

    Args:
        default: its value where a recipe says nothing; without one a recipe must give it.
        factory: makes the default where that is a list, a mapping or a section.
        gt: its numbers are greater than this.
        ge: they are this or greater.
        lt: they are less than this.
        le: they are this or less.
        lookup: of a key that names functions: where they are looked up (usercode/params.py).
        path: it names a local file or folder, relative ones as all of a recipe; a stage's name stays one.
    """
    about = {"range": Range(gt, ge, lt, le), "lookup": lookup, "path": path}
    if factory is not None:
        return field(default_factory=factory, metadata=about)
    return field(default=default, metadata=about)


def out_of_range(value: Any, where: str) -> Iterator[str]:
    """One line for each number of the dataclass `value`, which stands at `where`, outside its range."""
    for f in fields(value):
        accepted = f.metadata.get("range", Range())
        given, place = getattr(value, f.name), f"{where}.{f.name}" if where else f.name
        several = isinstance(given, list | tuple)
        for i, number in enumerate(given if several else [given]):
            if isinstance(number, int | float) and not isinstance(number, bool) and number not in accepted:
                yield (
                    f"{place}[{i}]: expected {accepted}, got {number}"
                    if several
                    else (f"{place}: expected {accepted}, got {number}")
                )
