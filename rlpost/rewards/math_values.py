"""Values of answers, independent of spelling: `math_read` makes them, `math_compare` compares two."""

from __future__ import annotations

from dataclasses import dataclass

from rlpost.rewards.math_expressions import Tree


@dataclass(frozen=True)
class Quantity:
    """A number or an expression, with its unit."""

    tree: Tree
    percent: bool = False
    """Written with a percent sign; `tree` is the number before the sign."""
    unit: str = ""


@dataclass(frozen=True)
class Words:
    """A text; compared without regard to capitals."""

    text: str
    tree: Tree | None = None
    """The product of its letters, if there are at most three."""


@dataclass(frozen=True)
class Choice:
    """One of several offered answers: `(B)`, or `(B) 12`."""

    letter: str
    value: Value | None = None
    """The value of the choice, where it is given too."""


@dataclass(frozen=True)
class InBase:
    """Digits in a base other than ten."""

    digits: str
    base: int


@dataclass(frozen=True)
class Exactly:
    """A date, a time of day or a ratio: equal if its parts are."""

    kind: str
    parts: tuple[int | str, ...]


@dataclass(frozen=True)
class Several:
    """More than one value."""

    kind: str
    """`list` (in order), `any` (written with "or", "and" or ±), `set`, or the brackets of a tuple, as in `(]`."""
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Span:
    """An interval of the reals; a single number has two equal, closed ends."""

    low: Tree
    high: Tree
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True)
class Reals:
    """A union of intervals."""

    spans: tuple[Span, ...]
    name: str = ""
    """The variable in these intervals, or ""."""


@dataclass(frozen=True)
class Matrix:
    """Rows of expressions."""

    kind: str
    """`matrix`, or `determinant` for one between bars."""
    rows: tuple[tuple[Tree, ...], ...]


@dataclass(frozen=True)
class Named:
    """`x = 5`."""

    name: str
    value: Value


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is not solved: difference = 0, > 0 or >= 0 (`!=`: not 0)."""

    sign: str
    difference: Tree


Value = Quantity | Words | Choice | InBase | Exactly | Several | Reals | Matrix | Named | Relation
