"""Arithmetic, exact where numbers are rational."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 500
"""Characters of an expression."""
LARGEST = 10**60
"""No intermediate result is larger than this, nor has a denominator that is."""
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ARITHMETIC = re.compile(r"[\d\s.eE+\-*/%()]+", re.ASCII)
_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_SPELLINGS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-"})


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has more than {LONGEST} characters")
    plain = _LEADING_ZEROS.sub("", expression.translate(_SPELLINGS).strip())
    try:
        tree = ast.parse(plain if _ARITHMETIC.fullmatch(plain) else "", mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    return _written(_value(tree.body))


def _value(node: ast.expr) -> Fraction:
    """The value of a node, whose depth is bounded by the expression's length."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(Fraction(node.value))
    if isinstance(node, ast.Constant) and type(node.value) is float:
        return _bounded(Fraction(repr(node.value)) if math.isfinite(node.value) else Fraction(LARGEST + 1))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATIONS:
            if right == 0 and not isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
                raise ValueError("division by zero")
            return _bounded(Fraction(_OPERATIONS[type(node.op)](left, right)))
    raise ValueError(f"{ast.unparse(node)!r} is no arithmetic")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if exponent.denominator == 1:
        sizes = max(abs(base.numerator), base.denominator)
        if sizes > 1 and abs(exponent) * math.log10(sizes) > math.log10(LARGEST):
            raise ValueError("the result is too large")
        return _bounded(base**exponent.numerator)
    if base < 0:
        raise ValueError("a root of a negative number")
    return _bounded(Fraction(float(base) ** float(exponent)))


def _bounded(value: Fraction) -> Fraction:
    """A value of a size that further operations can bear."""
    if abs(value) > LARGEST:
        raise ValueError("the result is too large")
    return value if value.denominator <= LARGEST else Fraction(float(value))


def _written(value: Fraction) -> str:
    """Whole numbers in full, others to twelve digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"
