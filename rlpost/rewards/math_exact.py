"""Rational trees, computed exactly up to a number of bits."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

from rlpost.rewards.math_expressions import Tree
from rlpost.rewards.math_text import Unreadable

BITS = 1 << 14
"""Largest size of an exact number by default: computed in no time."""
BITS_OF_ROOTS = 2048
"""Largest size of a number whose root is computed."""


class _NotRational(Exception):
    """The tree is not rational, or too large to be computed exactly."""


def exact(tree: Tree, bits: int = BITS) -> Fraction | None:
    """The value of a rational tree; None where it is not rational, or takes more than `bits` bits.

    Raises:
        Unreadable: it divides by zero.
    """
    try:
        return _Exact(bits).value(tree)
    except _NotRational:
        return None


def has_sign_choice(tree: Tree) -> bool:
    """Whether the tree contains ±."""
    return tree[0] in ("pm", "mp") or any(isinstance(p, tuple) and has_sign_choice(p) for p in tree[1:])


def with_signs(tree: Tree, upper: bool) -> Tree:
    """The tree with every ± read as its upper sign, or as its lower one."""
    if tree[0] in ("pm", "mp"):
        inner = with_signs(tree[1], upper)
        return inner if (tree[0] == "pm") == upper else ("neg", inner)
    return (tree[0], *(with_signs(p, upper) if isinstance(p, tuple) else p for p in tree[1:]))


class _Exact:
    def __init__(self, bits: int) -> None:
        self._bits = bits

    def value(self, tree: Tree) -> Fraction:
        kind = tree[0]
        if kind == "num":
            value: Fraction = tree[1]
            return value
        if kind not in ("+", "*", "/", "neg", "^", "root", "!", "binom", "abs", "floor", "ceil"):
            raise _NotRational
        given = [self.value(part) for part in tree[1:]]
        if kind == "+":
            return functools.reduce(lambda a, b: self._bounded(a + b), given)
        if kind == "*":
            return functools.reduce(lambda a, b: self._bounded(a * b), given)
        if kind == "/":
            if given[1] == 0:
                raise Unreadable("it divides by zero")
            return self._bounded(given[0] / given[1])
        if kind == "^":
            return self._power(*given)
        if kind == "root":
            return self._root(*given)
        if kind == "binom":
            return self._binomial(*given)
        one = given[0]
        if kind == "!":
            if one.denominator != 1 or one < 0 or one * int(one).bit_length() > self._bits:
                raise _NotRational
            return Fraction(math.factorial(int(one)))
        if kind == "neg":
            return -one
        if kind == "abs":
            return abs(one)
        return Fraction(math.floor(one) if kind == "floor" else math.ceil(one))

    def _bounded(self, value: Fraction) -> Fraction:
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > self._bits:
            raise _NotRational
        return value

    def _power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator != 1:
            return self._power(self._root(Fraction(exponent.denominator), base), Fraction(exponent.numerator))
        if base == 0:
            if exponent < 0:
                raise Unreadable("it divides by zero")
            if exponent == 0:
                raise Unreadable("0 to the power of 0 is undefined")
            return base
        if abs(base) == 1:
            return base ** int(exponent % 2)
        if abs(exponent) * (max(base.numerator.bit_length(), base.denominator.bit_length()) - 1) > self._bits:
            raise _NotRational
        return base ** int(exponent)

    def _root(self, degree: Fraction, value: Fraction) -> Fraction:
        """The real root where it is rational."""
        if degree.denominator != 1 or not 1 <= degree <= 64:
            raise _NotRational
        n = int(degree)
        if value < 0:
            if n % 2 == 0:
                raise _NotRational
            return -self._root(degree, -value)
        return Fraction(_whole_root(value.numerator, n), _whole_root(value.denominator, n))

    def _binomial(self, above: Fraction, below: Fraction) -> Fraction:
        if above.denominator != 1 or below.denominator != 1 or below < 0 or above < 0:
            raise _NotRational
        if below > above:
            return Fraction(0)
        if min(below, above - below) * int(above).bit_length() > self._bits:
            raise _NotRational
        return Fraction(math.comb(int(above), int(below)))


def _whole_root(value: int, n: int) -> int:
    if value.bit_length() > BITS_OF_ROOTS:
        raise _NotRational
    low, high = 0, 1 << (value.bit_length() // n + 1)
    while low < high:
        middle = (low + high + 1) // 2
        if middle**n <= value:
            low = middle
        else:
            high = middle - 1
    if low**n != value:
        raise _NotRational
    return low
