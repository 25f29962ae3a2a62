"""Compare two trees numerically: with many digits, and at many points if they have variables. Runs in the worker only.

The number of digits follows from the sizes of the terms added on the way, so that a difference is seen even where large
terms cancel. A tree that is too large to compute differs from one that is not.
All values are real unless i is written: without it, the square root of -1 has no value.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import mpmath

from rlpost.rewards.math_exact import exact
from rlpost.rewards.math_expressions import Tree, parts
from rlpost.rewards.math_text import Unreadable

BITS = 1 << 20
"""Largest size of an exact number here; the worker has a deadline."""
DIGITS = 60
MOST_DIGITS = 4_000
"""Only towers of powers need so many."""
POINTS = 40
ENOUGH = 3
"""Two trees are equal only if both have a value at this many points."""


class Undecided(Exception):
    """Equality could not be decided; says why."""


class _NoValue(Exception):
    """The tree has no value at this point: a division by zero, a root of a negative number."""


class _TooLarge(Exception):
    """The value needs more than MOST_DIGITS digits."""


class _Huge(Exception):
    """The value is positive and too large to compute."""


def equal(left: Tree, right: Tree) -> bool:
    """Whether two trees have the same value, for every value of their variables.

    Raises:
        Undecided: they are defined almost nowhere, or too large.
    """
    a, b = exact(left, BITS), exact(right, BITS)
    if a is not None and b is not None:
        return a == b
    return _compare(left, right, _same)


def proportional(left: Tree, right: Tree, positive: bool) -> bool:
    """Whether left = c·right with a constant c ≠ 0 (`positive`: c > 0): the same equation `left = 0`.

    Raises:
        Undecided: as for `equal`.
    """
    ratios: list[Any] = []

    def same_ratio(a: _Computed, b: _Computed) -> bool:
        if abs(b.value) <= b.error or abs(a.value) <= a.error:
            return bool(abs(b.value) <= b.error and abs(a.value) <= a.error)
        ratio = a.value / b.value
        ratios.append(ratio)
        close = abs(ratio - ratios[0]) <= abs(ratio) * mpmath.mpf(10) ** (10 - DIGITS)
        return bool(close and (not positive or mpmath.re(ratio) > 0))

    return _compare(left, right, same_ratio)


def _compare(left: Tree, right: Tree, agree: Callable[[_Computed, _Computed], bool]) -> bool:
    names = sorted({p[1] for tree in (left, right) for p in parts(tree) if p[0] == "name"})
    complex_too = any(p == ("i",) for tree in (left, right) for p in parts(tree))
    hidden_base = any(p[0] == "log" and p[1] is None for tree in (left, right) for p in parts(tree))
    whole = any(p[0] in ("!", "!!", "binom") for tree in (left, right) for p in parts(tree))
    met = 0
    for point in _points(names, hidden_base, whole, [*_literals(left), *_literals(right)]):
        with mpmath.workdps(DIGITS):
            a, b = (_at(tree, point, complex_too) for tree in (left, right))
            # Both sides with the digits of the side that needs more.
            if isinstance(a, _Computed) and isinstance(b, _Computed) and a.digits != b.digits:
                digits = max(a.digits, b.digits)
                a, b = (_at(tree, point, complex_too, digits) for tree in (left, right))
        if isinstance(a, str) or isinstance(b, str):
            if (a == "no value") != (b == "no value"):
                return False
            if (a == "huge") != (b == "huge") and "too large" not in (a, b):
                return False
            continue
        with mpmath.workdps(max(a.digits, b.digits)):
            if not agree(a, b):
                return False
        met += 1
    if met >= (ENOUGH if names else 1):
        return True
    raise Undecided("too large, or defined almost nowhere")


def _same(a: _Computed, b: _Computed) -> bool:
    return bool(abs(a.value - b.value) <= a.error + b.error)


def _literals(tree: Tree) -> Iterator[Fraction]:
    for part in parts(tree):
        if part[0] == "num" and abs(part[1]) < 10**9:
            yield part[1]


def _points(names: list[str], hidden_base: bool, whole: bool, literals: list[Fraction]) -> Iterator[dict[str, Any]]:
    """Values of the variables: whole numbers (only those with factorials), fractions, and near every number written."""
    extra = {" base": Fraction(29, 17)} if hidden_base else {}
    if not names:
        yield extra
        return
    chance = random.Random(7)
    sizes = [Fraction(37, 101), Fraction(83, 97), Fraction(171, 100), Fraction(293, 101), Fraction(731, 103)]
    sizes += [Fraction(1307, 99), Fraction(10171, 98), Fraction(100909, 97)]
    nearby = [
        x + step
        for x in dict.fromkeys([*literals, *(-x for x in literals)])
        for step in (Fraction(-3, 7), Fraction(2, 7))
    ]
    for i in range(POINTS + min(len(nearby), POINTS)):
        if i < 10 or whole:
            values = [Fraction(chance.randint(2, 12 + i)) for _ in names]
        elif i < 20:
            values = [chance.choice(sizes) * chance.choice((1, Fraction(7, 5))) for _ in names]
        elif i < POINTS:
            values = [chance.choice(sizes) * chance.choice((1, -1)) for _ in names]
        else:
            values = [nearby[(i - POINTS + j * 3) % len(nearby)] for j in range(len(names))]
        yield {**dict(zip(names, values, strict=True)), **extra}


class _Computed:
    """A value, its number of digits, and a bound on its error."""

    def __init__(self, value: Any, largest: Any, digits: int) -> None:
        self.value = value
        self.digits = digits
        self.error = largest * mpmath.mpf(10) ** (15 - digits)


def _at(tree: Tree, point: Mapping[str, Any], complex_too: bool, digits: int = DIGITS) -> _Computed | str:
    """The value at a point; computed again with more digits where large terms cancelled."""
    try:
        for _ in range(4):
            with mpmath.workdps(digits):
                run = _Run(point, complex_too)
                value = run.value(tree)
                needed = DIGITS + int(run.span)
                if needed > MOST_DIGITS:
                    return "too large"
                if needed <= digits:
                    return _Computed(value, max(run.largest, abs(value)), digits)
            digits = needed + DIGITS
        return "too large"
    except _Huge:
        return "huge"
    except (_TooLarge, OverflowError, MemoryError):
        return "too large"
    except (_NoValue, ZeroDivisionError, ValueError, Unreadable, mpmath.libmp.NoConvergence):
        return "no value"


class _Run:
    """One evaluation of a tree from its leaves up; records the sizes of its terms."""

    def __init__(self, point: Mapping[str, Any], complex_too: bool) -> None:
        self._point = point
        self._complex_too = complex_too
        self.largest = mpmath.mpf(0)
        """Largest term that was added or subtracted; the error scales with it."""
        self.span = 0.0
        """Decades between the largest and the smallest term."""

    def value(self, tree: Tree) -> Any:
        kind = tree[0]
        if kind == "num":
            return self._met(_number(tree[1]))
        if kind == "name":
            return _number(self._point[tree[1]])
        if kind in ("pi", "e", "i"):
            return {"pi": mpmath.pi, "e": mpmath.e, "i": mpmath.mpc(0, 1)}[kind] + 0
        if kind == "inf":
            raise _NoValue
        if kind == "^":
            return self._met(self._power(tree[1], tree[2]))
        if kind in ("!", "!!"):
            return self._met(self._factorial(tree))
        if kind == "log":
            return self._logarithm(tree)
        given = [self.value(part) for part in tree[1:]]
        if kind == "+":
            self.largest = max(self.largest, *(abs(term) for term in given))
            return mpmath.fsum(given)
        if kind == "root":
            return self._root(given[0], given[1])
        return self._met(self._function(kind, given))

    def _function(self, kind: str, given: list[Any]) -> Any:
        if kind in _PLAIN:
            return _PLAIN[kind](*given)
        if kind in _GUARDED:
            return _GUARDED[kind](self, *given)
        if kind.startswith("arc"):
            return self._arc(f"a{kind[3:]}", given[0])
        if kind.endswith("h"):
            return self._hyperbolic(kind, given[0])
        return self._circular(kind, given[0])

    def _met(self, value: Any) -> Any:
        if mpmath.isnan(value) or mpmath.isinf(value):
            raise _NoValue
        if not self._complex_too and mpmath.im(value) != 0:
            raise _NoValue
        if value != 0:
            size = abs(float(mpmath.mag(value))) * 0.30103
            if size > MOST_DIGITS:
                raise _TooLarge
            self.span = max(self.span, 2 * size)
        return value

    def _power(self, base_tree: Tree, exponent_tree: Tree) -> Any:
        base = self.value(base_tree)
        try:
            exponent = self.value(exponent_tree)
        except _Huge:
            if mpmath.im(base) == 0 and mpmath.re(base) >= 2:
                raise
            raise _TooLarge from None
        if base == 0:
            if mpmath.re(exponent) > 0:
                return base
            raise _NoValue
        with mpmath.workdps(30):
            decades = abs(exponent) * abs(mpmath.log(abs(base), 10))
        if decades > MOST_DIGITS:
            if mpmath.im(base) == mpmath.im(exponent) == 0 and base >= 2 and exponent > 0:
                raise _Huge
            raise _TooLarge
        if not self._complex_too and base < 0 and not mpmath.isint(exponent):
            rational = exact(exponent_tree) if not any(p[0] == "name" for p in parts(exponent_tree)) else None
            if rational is None or rational.denominator % 2 == 0:
                raise _NoValue
            return (-1) ** rational.numerator * mpmath.power(-base, exponent)
        return mpmath.power(base, exponent)

    def _root(self, degree: Any, value: Any) -> Any:
        if not mpmath.isint(degree) or not 1 <= degree <= 1000:
            raise _NoValue
        if mpmath.im(value) == 0 and value < 0:
            if int(degree) % 2:
                return -mpmath.root(-value, int(degree))
            if not self._complex_too:
                raise _NoValue
        return mpmath.root(value, int(degree))

    def _factorial(self, tree: Tree) -> Any:
        value = self.value(tree[1])
        if mpmath.im(value) != 0 or not mpmath.isint(value) or value < 0:
            raise _NoValue
        if value > MOST_DIGITS:
            raise _Huge
        return mpmath.fac(value) if tree[0] == "!" else mpmath.fac2(value)

    def _logarithm(self, tree: Tree) -> Any:
        argument = self._ln(self.value(tree[2]))
        # The base is unknown: a number nobody writes, so that only what holds for all bases is equal.
        base = _number(self._point[" base"]) if tree[1] is None else self.value(tree[1])
        return self._met(argument / self._ln(base))

    def _ln(self, value: Any) -> Any:
        if value == 0 or (not self._complex_too and value < 0):
            raise _NoValue
        return mpmath.log(value)

    def _exp(self, value: Any) -> Any:
        if abs(value) > MOST_DIGITS * 2:
            if mpmath.im(value) == 0 and value > 0:
                raise _Huge
            raise _TooLarge
        return mpmath.exp(value)

    def _hyperbolic(self, name: str, value: Any) -> Any:
        if abs(value) > MOST_DIGITS * 2:
            raise _TooLarge
        return getattr(mpmath, name)(value)

    def _circular(self, name: str, value: Any) -> Any:
        """Near a pole, rounding can give a huge value instead of none."""
        result = getattr(mpmath, name)(value)
        if name in ("tan", "sec", "csc", "cot") and abs(result) > mpmath.mpf(10) ** (mpmath.mp.dps // 2):
            raise _NoValue
        return result

    def _arc(self, name: str, value: Any) -> Any:
        if not self._complex_too and name != "atan" and abs(value) > 1:
            raise _NoValue
        return getattr(mpmath, name)(value)

    def _divide(self, above: Any, below: Any) -> Any:
        if abs(below) <= self.largest * mpmath.mpf(10) ** (15 - mpmath.mp.dps):
            raise _NoValue
        return above / below

    def _binomial(self, above: Any, below: Any) -> Any:
        if not (mpmath.isint(above) and mpmath.isint(below)) or below < 0 or above < 0:
            raise _NoValue
        if above > MOST_DIGITS:
            raise _TooLarge
        return mpmath.binomial(above, below)


def _number(value: Fraction) -> Any:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 4 * MOST_DIGITS:
        raise _Huge if value > 1 else _TooLarge
    return mpmath.mpf(value.numerator) / value.denominator


_PLAIN: dict[str, Callable[..., Any]] = {
    "*": lambda *factors: mpmath.fprod(factors),
    "neg": operator.neg,
    "abs": abs,
    "deg": lambda a: a * mpmath.pi / 180,
    "floor": mpmath.floor,
    "ceil": mpmath.ceil,
}
_GUARDED: dict[str, Callable[..., Any]] = {
    "/": _Run._divide,
    "binom": _Run._binomial,
    "exp": _Run._exp,
    "ln": _Run._ln,
}
