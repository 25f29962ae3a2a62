"""Compare an answer with its reference. The reference decides whether order, base and form count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rlpost.rewards.math_exact import exact
from rlpost.rewards.math_expressions import Tree, parts
from rlpost.rewards.math_read import as_interval
from rlpost.rewards.math_values import (
    Choice,
    Exactly,
    Matrix,
    Named,
    Quantity,
    Reals,
    Relation,
    Several,
    Span,
    Value,
    Words,
)


class NeedsAlgebra(Exception):
    """The comparison needs values that are not rational."""


@dataclass(frozen=True)
class Algebra:
    """How trees that are not rational are compared."""

    equal: Callable[[Tree, Tree], bool]
    proportional: Callable[[Tree, Tree, bool], bool]


def _not_here(*_: object) -> bool:
    raise NeedsAlgebra


NO_ALGEBRA = Algebra(_not_here, _not_here)


def same(reference: Value, answer: Value, algebra: Algebra = NO_ALGEBRA) -> bool:
    """Whether the answer is right.

    Raises:
        NeedsAlgebra: the comparison needs more than rational numbers, and `algebra` is not given.
    """
    return _Comparison(algebra).same(reference, answer)


class _Comparison:
    def __init__(self, algebra: Algebra) -> None:
        self._algebra = algebra

    def same(self, reference: Value, answer: Value) -> bool:
        if reference == answer:
            return True
        if isinstance(reference, Choice) or isinstance(answer, Choice):
            return self._choices(reference, answer)
        if isinstance(reference, Named) and isinstance(answer, Named):
            return reference.name == answer.name and self.same(reference.value, answer.value)
        if isinstance(reference, Relation) or isinstance(answer, Relation):
            return self._relations(reference, answer)
        if isinstance(reference, Named):
            return _may_be(answer, reference.name) and self.same(reference.value, answer)
        if isinstance(answer, Named):
            return _may_be(reference, answer.name) and self.same(reference, answer.value)
        if isinstance(reference, Words) or isinstance(answer, Words):
            return self._words(reference, answer)
        if isinstance(reference, Reals) or isinstance(answer, Reals):
            return self._reals(as_interval(reference), as_interval(answer))
        if isinstance(reference, Quantity) and isinstance(answer, Quantity):
            return self._quantities(reference, answer)
        if isinstance(reference, Quantity) and isinstance(answer, Several) and answer.kind == "any":
            return all(self.same(reference, item) for item in answer.items)  # 5/2 or 2.5
        if isinstance(reference, Several) and isinstance(answer, Several):
            return self._several(reference, answer)
        if isinstance(reference, Matrix) and isinstance(answer, Matrix):
            return self._matrices(reference, answer)
        if isinstance(reference, Exactly) and isinstance(answer, Exactly):
            return self._exactly(reference, answer)
        return False

    def _quantities(self, reference: Quantity, answer: Quantity) -> bool:
        """Units must agree only where both have one."""
        if reference.unit and answer.unit and reference.unit != answer.unit:
            return False
        if reference.percent == answer.percent:
            return self.equal(reference.tree, answer.tree)
        if reference.unit or answer.unit:
            return False
        percentage, plain = (reference, answer) if reference.percent else (answer, reference)
        share: Tree = ("/", percentage.tree, ("num", Fraction(100)))
        return self.equal(plain.tree, percentage.tree) or self.equal(plain.tree, share)

    def equal(self, left: Tree, right: Tree) -> bool:
        if left == right:
            return True
        if any(p == ("inf",) for tree in (left, right) for p in parts(tree)):
            return False
        a, b = exact(left), exact(right)
        if a is not None and b is not None:
            return a == b
        return self._algebra.equal(left, right)

    def _choices(self, reference: Value, answer: Value) -> bool:
        """Compare letters where both have one, else values; letters and values where both have both."""
        left, right = _as_choice(reference), _as_choice(answer)
        if left is not None and right is not None:
            if left.letter != right.letter:
                return False
            return left.value is None or right.value is None or self.same(left.value, right.value)
        values = [v.value if isinstance(v, Choice) else v for v in (reference, answer)]
        return values[0] is not None and values[1] is not None and self.same(values[0], values[1])

    def _words(self, reference: Value, answer: Value) -> bool:
        if isinstance(reference, Words) and isinstance(answer, Words):
            return reference.text == answer.text
        trees = [
            v.tree
            if isinstance(v, Words)
            else v.tree
            if isinstance(v, Quantity) and not v.unit and not v.percent
            else None
            for v in (reference, answer)
        ]
        return trees[0] is not None and trees[1] is not None and self.equal(trees[0], trees[1])

    def _several(self, reference: Several, answer: Several) -> bool:
        if len(reference.kind) == 2 or len(answer.kind) == 2:
            return reference.kind == answer.kind and self._in_order(reference.items, answer.items)
        given = answer.items
        if answer.kind == "set" and reference.kind == "set":
            return self._in_any_order(self._distinct(reference.items), self._distinct(given))
        if reference.kind in ("set", "any"):
            return self._in_any_order(self._distinct(reference.items), given)
        if _all_named(reference.items) and _all_named(given):
            return self._in_any_order(reference.items, given)
        return self._in_order(reference.items, given)

    def _in_order(self, left: Sequence[Value], right: Sequence[Value]) -> bool:
        return len(left) == len(right) and all(self.same(a, b) for a, b in zip(left, right, strict=True))

    def _in_any_order(self, left: Sequence[Value], right: Sequence[Value]) -> bool:
        if len(left) != len(right):
            return False
        waiting = list(right)
        for value in left:
            found = next((i for i, other in enumerate(waiting) if self.same(value, other)), None)
            if found is None:
                return False
            waiting.pop(found)
        return True

    def _distinct(self, items: Sequence[Value]) -> list[Value]:
        kept: list[Value] = []
        for item in items:
            if not any(self.same(other, item) for other in kept):
                kept.append(item)
        return kept

    def _reals(self, reference: Value, answer: Value) -> bool:
        if not isinstance(reference, Reals) or not isinstance(answer, Reals):
            return False
        if reference.name and answer.name and reference.name != answer.name:
            return False
        left, right = _merged(reference.spans), _merged(answer.spans)
        if len(left) != len(right):
            return False
        waiting = list(right)
        for span in left:
            found = next((i for i, other in enumerate(waiting) if self._span(span, other)), None)
            if found is None:
                return False
            waiting.pop(found)
        return True

    def _span(self, left: Span, right: Span) -> bool:
        ends_alike = (left.low_closed, left.high_closed) == (right.low_closed, right.high_closed)
        return ends_alike and self.equal(left.low, right.low) and self.equal(left.high, right.high)

    def _matrices(self, reference: Matrix, answer: Matrix) -> bool:
        shapes = [(m.kind, len(m.rows), len(m.rows[0])) for m in (reference, answer)]
        if shapes[0] != shapes[1]:
            return False
        pairs = zip(reference.rows, answer.rows, strict=True)
        return all(self.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))

    def _exactly(self, reference: Exactly, answer: Exactly) -> bool:
        """`3:30` is a ratio or a time: compared with a ratio it is read as a ratio."""
        kinds = {reference.kind, answer.kind}
        return kinds == {"ratio", "clock"} and _as_ratio(reference) == _as_ratio(answer)

    def _relations(self, reference: Value, answer: Value) -> bool:
        """Unsolved equations are the same if one is the other times a constant; of a solved one the value counts."""
        left, right = _as_relation(reference), _as_relation(answer)
        if left is None or right is None or left.sign != right.sign:
            return False
        return left.difference == right.difference or self._algebra.proportional(
            left.difference, right.difference, left.sign in (">", ">=")
        )


def _as_choice(value: Value) -> Choice | None:
    if isinstance(value, Choice):
        return value
    if isinstance(value, Quantity) and value.tree[0] in ("name", "e", "i") and not value.unit:
        letter = value.tree[1] if value.tree[0] == "name" else value.tree[0]
        return Choice(letter.upper()) if len(letter) == 1 else None
    return None


def _letters(value: Value) -> Tree | None:
    """The expression of a value; of a text, its letters multiplied."""
    if isinstance(value, Quantity):
        return None if value.unit or value.percent else value.tree
    return value.tree if isinstance(value, Words) else None


def _as_relation(value: Value) -> Relation | None:
    """`y = 2x + 1` as an equation; None for `x = 5`, which is solved (`2x = 10` does not equal it)."""
    if isinstance(value, Relation):
        return value
    if isinstance(value, Named) and isinstance(value.value, Quantity) and not value.value.percent:
        tree = value.value.tree
        if any(p[0] == "name" for p in parts(tree)) and len(value.name) == 1:
            return Relation("=", ("+", ("name", value.name), ("neg", tree)))
    return None


def _may_be(value: Value, name: str) -> bool:
    """Whether no item of a list is named as another variable."""
    items = value.items if isinstance(value, Several) else ()
    return all(item.name == name for item in items if isinstance(item, Named))


def _all_named(items: Sequence[Value]) -> bool:
    names = [item.name for item in items if isinstance(item, Named)]
    return len(names) == len(items) == len(set(names))


def _as_ratio(value: Exactly) -> tuple[int, ...]:
    terms = [t for t in value.parts[:2] if isinstance(t, int)] if value.kind == "clock" else []
    if not terms:
        return tuple(t for t in value.parts if isinstance(t, int))
    common = Fraction(terms[0], terms[1]) if terms[1] else Fraction(0)
    return (common.numerator, common.denominator)


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Intervals in order, those that touch joined; unchanged where an end is not rational."""
    keyed: list[tuple[float | Fraction, float | Fraction, Span]] = []
    for span in spans:
        low, high = _end(span.low), _end(span.high)
        if low is None or high is None:
            return list(spans)
        if low < high or (low == high and span.low_closed and span.high_closed):
            keyed.append((low, high, span))
    keyed.sort(key=lambda k: (k[0], not k[2].low_closed))
    merged: list[tuple[float | Fraction, float | Fraction, Span]] = []
    for low, high, span in keyed:
        if merged:
            first_low, last_high, last = merged[-1]
            if low < last_high or (low == last_high and (span.low_closed or last.high_closed)):
                if high > last_high:
                    merged[-1] = (first_low, high, Span(last.low, span.high, last.low_closed, span.high_closed))
                elif high == last_high and span.high_closed:
                    merged[-1] = (first_low, high, Span(last.low, last.high, last.low_closed, True))
                continue
        merged.append((low, high, span))
    return [span for _, _, span in merged]


def _end(tree: Tree) -> float | Fraction | None:
    if tree == ("inf",):
        return float("inf")
    if tree == ("neg", ("inf",)):
        return float("-inf")
    return exact(tree)
