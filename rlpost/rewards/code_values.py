"""Expressions of tests, computed here: from constants and from values that a program in the sandbox has answered.

What a program answered is data that it chose freely, to be slow or large as well. So there is no `eval`: a few
operations on plain data, none of which takes long or gives much more than it was given.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

FAILURES = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""What computing with wrong values may raise."""
_LONGEST = 1_000_000
"""Items of what a test makes itself."""
_BITS = 1 << 20
_EXPONENT = 10_000
_NUMBERS = (int, float, complex)
_TYPES: Mapping[str, Any] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
}
_KEYWORDS = {"sorted": {"reverse"}, "min": {"default"}, "max": {"default"}, "math.isclose": {"rel_tol", "abs_tol"}}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class Each:
    """The items of something that can be iterated and is no list: a generator, a dict's keys. It equals nothing."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def decoded(value: Any) -> Any:
    """A value as `code_driver.encoded` wrote it; one of `FAILURES` if it is none."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    if name == "int":
        return int(content, 16)
    if name == "float":
        return float.fromhex(content)
    if name == "complex":
        return complex(*map(float.fromhex, content))
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "dict":
        return {decoded(key): decoded(item) for key, item in content}
    return {"tuple": tuple, "set": set, "each": Each}[name]([decoded(item) for item in content])


def computes(node: ast.expr) -> bool:
    """Whether `value` knows what to do with the expression itself, its operands aside; else the program is asked."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        keywords = {keyword.arg for keyword in node.keywords}
        if name not in _FUNCTIONS or any(isinstance(argument, ast.Starred) for argument in node.args):
            return False
        if name == "isinstance":
            return len(node.args) == 2 and all(ast.unparse(kind) in _TYPES for kind in _kinds(node.args[1]))
        return keywords <= _KEYWORDS.get(name, set())
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATIONS
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.USub | ast.UAdd | ast.Not)
    if isinstance(node, ast.Dict):
        return None not in node.keys
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return not any(isinstance(item, ast.Starred) for item in node.elts)
    return isinstance(node, ast.Constant | ast.Compare | ast.BoolOp)


def operands(node: ast.expr) -> list[ast.expr]:
    """The expressions that one which `computes` is computed of."""
    if isinstance(node, ast.Call):
        own = node.args[:1] if ast.unparse(node.func) == "isinstance" else node.args
        return [*own, *(keyword.value for keyword in node.keywords)]
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def value(node: ast.expr, answers: Mapping[ast.expr, Any]) -> Any:
    """What an expression is; one of `FAILURES` if it is nothing. `answers` has those that the program was asked."""
    if node in answers:
        return answers[node]
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name == "isinstance":
            kinds = tuple(_TYPES[ast.unparse(kind)] for kind in _kinds(node.args[1]))
            return isinstance(value(node.args[0], answers), kinds)
        given = [value(argument, answers) for argument in node.args]
        return _FUNCTIONS[name](*given, **{k.arg: value(k.value, answers) for k in node.keywords if k.arg})
    if isinstance(node, ast.Compare):
        return _compared(node, answers)
    if isinstance(node, ast.BoolOp):
        decide = all if isinstance(node.op, ast.And) else any
        return decide(value(operand, answers) for operand in node.values)
    if isinstance(node, ast.UnaryOp):
        operand = value(node.operand, answers)
        if isinstance(node.op, ast.Not):
            return not operand
        return -operand if isinstance(node.op, ast.USub) else +operand
    if isinstance(node, ast.BinOp):
        return _operated(type(node.op), value(node.left, answers), value(node.right, answers))
    if isinstance(node, ast.Dict):
        keys = [value(key, answers) for key in node.keys if key is not None]
        return dict(zip(keys, [value(item, answers) for item in node.values], strict=True))
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        items = [value(item, answers) for item in node.elts]
        return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)](items)
    assert isinstance(node, ast.Constant)
    return node.value


def _compared(node: ast.Compare, answers: Mapping[ast.expr, Any]) -> bool:
    values = [value(operand, answers) for operand in (node.left, *node.comparators)]
    return all(
        _COMPARISONS[type(op)](left, right) for op, left, right in zip(node.ops, values, values[1:], strict=False)
    )


def _operated(operation: type[ast.operator], left: Any, right: Any) -> Any:
    numbers = isinstance(left, _NUMBERS) and isinstance(right, _NUMBERS)
    if operation is ast.Mult and not numbers:
        sequence, times = (right, left) if isinstance(left, int) else (left, right)
        if not isinstance(times, int) or len(sequence) * times > _LONGEST:
            raise TypeError("a sequence is not repeated as often")
    elif operation is ast.Pow:
        if not numbers or abs(right) > _EXPONENT or (isinstance(left, int) and left.bit_length() * right > _BITS):
            raise TypeError("the power is too large")
    elif operation not in (ast.Add, ast.Sub) and not numbers:
        raise TypeError("numbers are needed")  # `%` of a text is a format, which may be as wide as it likes
    return _OPERATIONS[operation](left, right)


def _kinds(node: ast.expr) -> list[ast.expr]:
    """The types that isinstance is given, one or a tuple of them."""
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _range(*arguments: int) -> Sequence[int]:
    made = range(*arguments)
    if len(made) > _LONGEST:
        raise ValueError("the range is too long")
    return made


def _round(number: Any, digits: Any = None) -> Any:
    if digits is not None and abs(digits) > 100:
        raise ValueError("no number has as many digits")
    return round(number, digits)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: kind for name, kind in _TYPES.items() if name != "bytes"},  # bytes(n) makes n of them
    "abs": abs,
    "all": all,
    "any": any,
    "isinstance": isinstance,
    "len": len,
    "math.isclose": math.isclose,
    "max": max,
    "min": min,
    "range": _range,
    "round": _round,
    "sorted": sorted,
    "sum": sum,
}
