"""The tests of a row, read before anything runs, and what decides each: here, not where the program runs.

A test is what a program should print for what it reads, or an assertion. Of an assertion the program is asked only for
the values of what it defines: of `assert area(2, 3) == 6` it is asked for `area(2, 3)`, and 6 stays here. It cannot
seem right without knowing what is right.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlpost.errors import DataError
from rlpost.rewards.code_values import FAILURES, computes, decoded, operands, value
from rlpost.suggest import hint_or_list

_SETTING_UP = (
    *(ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Import, ast.ImportFrom),
    *(ast.FunctionDef, ast.ClassDef),
)
"""Statements before an assertion."""
_OUT_OF_PLACE = (ast.Assert, ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)
_METHODS = {name for kind in (str, list, dict, set, int, float) for name in dir(kind)}


@dataclass(frozen=True)
class Printed:
    """What a program should print, given what it reads."""

    stdin: str
    stdout: str

    def passed(self, stdout: str) -> bool:
        """Whether it printed this: line by line, without the spaces and the empty lines at the end."""
        return _lines(stdout) == _lines(self.stdout)


@dataclass(frozen=True, eq=False)
class Assertion:
    """An assertion, taken apart."""

    before: str
    """Statements that the program runs before it is asked."""
    asked: tuple[ast.expr, ...]
    """What the program is asked for."""
    decides: ast.expr
    """The whole expression, computed here of what the program answered."""

    def function(self, number: int) -> str:
        """The text of a function of the program that returns what is asked, as a list."""
        lines = [*self.before.splitlines(), f"return [{', '.join(map(ast.unparse, self.asked))}]"]
        return f"def asked_{number}():\n" + "".join(f"    {line}\n" for line in lines)

    def passed(self, answers: Any) -> bool:
        """Whether it holds with the program's answers, as they were received."""
        try:
            found = dict(zip(self.asked, map(decoded, answers), strict=True))
            return bool(value(self.decides, found))
        except FAILURES:
            return False


Test = Printed | Assertion


def read_tests(example: Mapping[str, Any], column: str) -> tuple[Test, ...]:
    """The tests in a column of a row, all of one kind.

    Raises:
        DataError: there are none, or one is no test.
    """
    if column not in example:
        raise DataError(
            f"code: column: a row has no column {column!r}{hint_or_list(column, map(str, example), 'it has')}"
        )
    found = example[column]
    if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__iter__"):
        raise DataError(f"code: column: {column!r} is a {type(found).__name__} in a row; give a list of tests")
    tests = [_read(test, f"code: {column}[{number}]") for number, test in enumerate(found)]
    if not tests:
        raise DataError(f"code: column: {column!r} is empty in a row; leave such rows out of the data")
    if len({type(test) for test in tests}) > 1:
        raise DataError(
            f"code: column: {column!r} has assertions and {{input, output}} in a row; give tests of one kind"
        )
    return tuple(tests)


def _read(test: Any, where: str) -> Test:
    if isinstance(test, str):
        try:
            return _assertion(test)
        except _Unusable as error:
            shown = test if len(test) <= 60 else f"{test[:59]}…"
            raise DataError(f"{where}: {shown!r} {error}") from error
    keys = sorted(map(str, test)) if isinstance(test, Mapping) else None
    if keys == ["input", "output"] and isinstance(test["input"], str) and isinstance(test["output"], str):
        return Printed(test["input"], test["output"])
    raise DataError(f"{where}: is no test; give an assertion as text, or {{input: TEXT, output: TEXT}}")


class _Unusable(Exception):
    """Why a text is no test, with the remedy."""


@lru_cache(maxsize=1 << 16)
def _assertion(text: str) -> Assertion:
    try:
        return _taken_apart(ast.parse(text).body)
    except (SyntaxError, ValueError) as error:
        raise _Unusable(f"is no Python ({str(error).splitlines()[0]}); mend it, or leave such rows out") from error
    except (RecursionError, MemoryError) as error:
        raise _Unusable("is nested too deeply; simplify it") from error


def _taken_apart(statements: Sequence[ast.stmt]) -> Assertion:
    if not statements or not isinstance(statements[-1], ast.Assert):
        raise _Unusable("asserts nothing; let it end with `assert …`")
    before, decides = statements[:-1], statements[-1].test
    for statement in before:
        if not isinstance(statement, _SETTING_UP) or any(isinstance(n, _OUT_OF_PLACE) for n in ast.walk(statement)):
            raise _Unusable(
                "has other statements before it than assignments, calls, imports and definitions; simplify it"
            )
        if isinstance(statement, ast.ImportFrom) and any(alias.name == "*" for alias in statement.names):
            raise _Unusable("imports *; name what it needs")
    asked = tuple(_asked(decides))
    if not asked:
        raise _Unusable("calls nothing of the program; leave it out")
    for node in _computed(decides):
        _check_known(node)
    for expression in asked:
        _check_asked(expression)
    for expression in _truths(decides):
        if expression in asked:
            _check_truth(expression)
    return Assertion("\n".join(map(ast.unparse, before)), asked, decides)


def _asked(node: ast.expr) -> Iterator[ast.expr]:
    """The largest parts of an expression that only the program knows."""
    if not computes(node):
        yield node
        return
    for operand in operands(node):
        yield from _asked(operand)


def _computed(node: ast.expr) -> Iterator[ast.expr]:
    """The parts that are computed here."""
    if computes(node):
        yield node
        for operand in operands(node):
            yield from _computed(operand)


def _check_known(node: ast.expr) -> None:
    """That constants can be computed, and that what the program says is compared with what it does not say."""
    if not set(_asked(node)):
        try:
            value(node, {})
        except FAILURES as error:
            raise _Unusable(
                f"has {ast.unparse(node)!r}, which cannot be computed ({error}); write its value"
            ) from error
    if isinstance(node, ast.Compare):
        unknown = [operand for operand in (node.left, *node.comparators) if set(_asked(operand))]
        if len(unknown) > 1:
            raise _Unusable("compares what the program says with what it says; write one side as a value")
        if any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops) and not _with_singletons(node, unknown):
            raise _Unusable("compares by `is`; write ==")
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "range" and set(_asked(node)):
        raise _Unusable("has a range as long as the program says; write its value")


def _with_singletons(node: ast.Compare, unknown: Sequence[ast.expr]) -> bool:
    known = [side for side in (node.left, *node.comparators) if side not in unknown]
    return all(isinstance(side, ast.Constant) and isinstance(side.value, bool | None) for side in known)


def _check_asked(node: ast.expr) -> None:
    """That nothing is decided where the program runs; what a lambda is made of is an argument like another."""
    inside: list[ast.AST] = [node]
    while inside:
        part = inside.pop()
        if isinstance(part, ast.Compare | ast.BoolOp | ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            raise _Unusable(f"decides within {ast.unparse(node)!r}, where the program may decide; compare its value")
        inside += [] if isinstance(part, ast.Lambda) else ast.iter_child_nodes(part)


def _truths(node: ast.expr) -> Iterator[ast.expr]:
    """The parts of which it matters only whether they are true."""
    if isinstance(node, ast.BoolOp):
        for operand in node.values:
            yield from _truths(operand)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _truths(node.operand)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("all", "any", "bool"):
        for operand in node.args:
            yield from operand.elts if isinstance(operand, ast.List | ast.Tuple | ast.Set) else [operand]
    elif isinstance(node, ast.Compare):
        sides = (node.left, *node.comparators)
        if any(isinstance(side, ast.Constant) and isinstance(side.value, bool) for side in sides):
            yield from sides
    else:
        yield node


def _check_truth(node: ast.expr) -> None:
    """That the program does not judge itself: `close(area(2), 4)` would be true for one that defines `close` so."""
    if not isinstance(node, ast.Call):
        return
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    for call in (part for argument in arguments for part in ast.walk(argument) if isinstance(part, ast.Call)):
        if not (isinstance(call.func, ast.Name) and hasattr(builtins, call.func.id)):
            raise _Unusable(f"lets the program judge {ast.unparse(call)!r}; compare that with its value")
    if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
        raise _Unusable(f"trusts {node.func.attr!r} of what the program returns; compare the value itself")


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines
