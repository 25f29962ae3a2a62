"""What an answer can be. A value says nothing about spelling; `math_read` makes it, `math_compare` compares two."""

from __future__ import annotations

from dataclasses import dataclass

from rlpost.rewards.math_expressions import Tree


@dataclass(frozen=True)
class Quantity:
    """A number or an expression, with what it counts."""

    tree: Tree
    percent: bool = False
    """Written with a percent sign, which `tree` does not take into account."""
    unit: str = ""


@dataclass(frozen=True)
class Words:
    """A text: compared word for word, capitals aside."""

    text: str
    tree: Tree | None = None
    """What it is if its letters (three at most) were meant to be multiplied."""


@dataclass(frozen=True)
class Choice:
    """One of several offered answers: `(B)`, or `(B) 12`."""

    letter: str
    value: Value | None = None
    """What the choice says, where that is given too."""


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
    """`list` (in order), `any` (said with "or", "and" or ±), `set`, or the brackets of a tuple, as in `(]`."""
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
    """The variable that lies there, where it was written."""


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
