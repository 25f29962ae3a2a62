"""Read the value of an answer's text. Raises Unreadable, with the reason, where it is ambiguous or no mathematics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from rlpost.rewards.math_exact import exact, has_sign_choice, with_signs
from rlpost.rewards.math_expressions import Tree, parse, parts
from rlpost.rewards.math_split import cut, elements, whole_bracket
from rlpost.rewards.math_text import Unreadable, normalise
from rlpost.rewards.math_units import split_magnitude, split_unit
from rlpost.rewards.math_values import (
    Choice,
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
from rlpost.rewards.math_words import INFINITY, REALS, choice, from_words

_PLAIN = re.compile(r"-?(?:\d{1,15}|[1-9]\d{0,2}(?:,\d{3}){1,4})(?:\.\d{1,15})?")
_APPROXIMATELY = re.compile(r"(?:\\approx|\\sim|~|\b(?:approximately|about|roughly|around|exactly))\s*", re.IGNORECASE)
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx)(?![a-zA-Z])|[<>=]")
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_WITHOUT = re.compile(r"\\setminus(?![a-zA-Z])")
_SUCH_THAT = re.compile(r"\||:")
_MATRIX = re.compile(
    r"([\[(|]?)\s*\\begin\{([a-zA-Z]*matrix|array)\}(?:\s*\{[lcr|\s]*\})?(.*)\\end\{\2\}\s*([\])|]?)", re.S
)
_LEFT_SIDE = re.compile(
    r"(?:(?:\\angle\s*)?\\?[A-Za-z]+'*|\\bold\{\w+\}|⟦[^⟦⟧]*⟧|\|[A-Z]{2}\|)(?:_\{?\s*\w+\s*\}?|_\{⟦[^⟦⟧]*⟧\})?(?:\^\{-1\})?"
    r"(?:\(\s*(?:\\?[a-zA-Z]+|-?\d+(?:\.\d+)?)(?:\s*,\s*(?:\\?[a-zA-Z]+|-?\d+(?:\.\d+)?))*\s*\))?"
)
_NAMES = re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)")
_IMPLIES = re.compile(r"\\(?:implies|Rightarrow|Longrightarrow|therefore)(?![a-zA-Z])|⇒|∴")
_ORDINAL = re.compile(r"(-?\d{1,9})\s*(?:\^?\s*\{?\s*⟦?\s*(?:st|nd|rd|th)\s*⟧?\s*\}?)(?:\s+[A-Za-z]+)?")
_AND_A_HALF = re.compile(r"(\d+) and (?:a|one)[ -](half|third|quarter)\b(.*)")
_PARTS = {"half": "1/2", "third": "1/3", "quarter": "1/4"}
_REPEATED = re.compile(r"([^()]*\S) \(([A-Za-z -]{2,})\)((?: [^()]*)?)")
_AND = re.compile(r"⟦\s*,?\s*(and|or)\s*⟧")


@lru_cache(maxsize=8192)
def read(text: str) -> Value:
    """The value of an answer's text.

    Raises:
        Unreadable: it is not an answer, or can be read in two ways.
    """
    if _PLAIN.fullmatch(text):
        return Quantity(("num", Fraction(text.replace(",", ""))))
    text = normalise(text).strip().rstrip(",;").strip()
    if text.startswith("⟦") and text.endswith("⟧") and text.count("⟦") == 1:
        text = text[1:-1].strip().rstrip(".")
    if not text:
        raise Unreadable("it is empty")
    marked = choice(text)
    if marked is not None:
        return Choice(marked[0], _choice_value(marked[1]))
    return _list(_AND.sub(r" \1 ", text))


def _choice_value(text: str) -> Value | None:
    if not text:
        return None
    try:
        return _list(text)
    except Unreadable:
        return Words(text.casefold())


def _list(text: str) -> Value:
    """One value, or several between commas and words."""
    text = _APPROXIMATELY.sub("", text, count=1) if _APPROXIMATELY.match(text) else text
    text = _IMPLIES.split(text)[-1].strip()
    text = re.sub(r"^(?:negative|minus)\s+(?=[\d.])", "-", text, flags=re.IGNORECASE)
    match = _AND_A_HALF.fullmatch(text)
    if match:
        text = f"{match[1]} {_PARTS[match[2]]}{match[3]}"
    text = re.sub(r"(?<=\d) and (?=\d+/\d+(?!\d))", " ", text)  # 1 and 1/2
    value = from_words(text)
    if value is not None:
        return value
    if (
        (twice := _REPEATED.fullmatch(text))
        and (value := from_words(twice[2])) is not None
        and value == _list(twice[1])
    ):
        return _list(twice[1] + twice[3])  # 7 (seven) apples
    found, separators = elements(text, inside=False)
    if len(found) == 1:
        return _one(found[0])
    if "" in found:
        raise Unreadable("an element of a list is missing")
    values = [_one(element) for element in found]
    words = {s.strip(",;") for s in separators} - {""}
    ranges = [v for v in values if isinstance(v, Reals) and v.name]
    if words and len(ranges) == len(values):
        return _joined(ranges, words)
    return _several(values, "any" if words else "list")


def _several(values: Sequence[Value], kind: str) -> Value:
    names = {v.name for v in values if isinstance(v, Named)}
    named = [v for v in values if isinstance(v, Named)]
    if len(names) == 1 and named[0] is values[0]:
        # x = 1, x = 2 and x = 1 or 2 are values of one variable: their order does not count.
        free = "any" if len(named) > 1 else kind
        return Named(named[0].name, _flat([v.value if isinstance(v, Named) else v for v in values], free))
    return _flat(values, kind)


def _flat(values: Sequence[Value], kind: str) -> Several:
    """`5 ± 2` and `1 or 2` inside a list count as its items."""
    items: list[Value] = []
    for value in values:
        if isinstance(value, Several) and value.kind == "any":
            items += value.items
            kind = "any" if kind == "list" else kind
        else:
            items.append(value)
    return Several(kind, tuple(items))


def _joined(ranges: Sequence[Reals], words: set[str]) -> Value:
    """x < 1 or x > 3; with "and", what lies in both."""
    if len({r.name for r in ranges}) > 1 or len(words) > 1:
        raise Unreadable("inequalities of several variables, or joined in several ways")
    if words == {"or"}:
        return Reals(tuple(span for r in ranges for span in r.spans), ranges[0].name)
    spans = [span for r in ranges for span in r.spans]
    if len(spans) == len(ranges) == 2:
        lows = [s for s in spans if s.low != ("neg", INFINITY)]
        highs = [s for s in spans if s.high != INFINITY]
        if len(lows) == len(highs) == 1:
            low, high = lows[0], highs[0]
            return Reals((Span(low.low, high.high, low.low_closed, high.high_closed),), ranges[0].name)
    raise Unreadable('inequalities joined by "and" that are not an interval')


def _one(text: str) -> Value:
    """One element: a relation or an operand."""
    text = _APPROXIMATELY.sub("", text, count=1) if _APPROXIMATELY.match(text) else text
    found, signs = cut(text, _RELATION)
    if not signs:
        return _operand(text)
    if "" in found:
        raise Unreadable("a relation without a left or right side")
    if "\\approx" in signs:
        # What stands before ≈ is exact, unless it is a name.
        at = signs.index("\\approx")
        keep = at + 2 if at == 0 and _LEFT_SIDE.fullmatch(found[0]) else at + 1
        found, signs = found[:keep], ["=" if s == "\\approx" else s for s in signs[: keep - 1]]
        if not signs:
            return _operand(found[0])
    if set(signs) == {"="}:
        return _equation(found)
    if signs == ["\\in"]:
        value = as_interval(_operand(found[1]))
        return replace(value, name=_name_of(found[0])) if isinstance(value, Reals) else value
    return _inequality([parse(side) for side in found], signs)


def _equation(sides: list[str]) -> Value:
    if len(sides) == 2 and not _LEFT_SIDE.fullmatch(sides[0]) and _LEFT_SIDE.fullmatch(sides[1]):
        sides = sides[::-1]  # 5 = x
    if _LEFT_SIDE.fullmatch(sides[0]) or _NAMES.fullmatch(sides[0]):
        value = _operand(sides[-1])
        return Named(_name_of(sides[0]), value)
    trees = [_tree_of(_operand(side)) for side in sides]
    if not any(p[0] == "name" for tree in trees for p in parts(tree)):
        return _operand(sides[-1])  # 2 + 3 = 5
    if len(trees) > 2:
        raise Unreadable("a chain of equations")
    return Relation("=", ("+", trees[0], ("neg", trees[1])))


def _tree_of(value: Value) -> Tree:
    if isinstance(value, Quantity) and not value.percent:
        return value.tree
    if isinstance(value, Words) and value.tree is not None:
        return value.tree
    raise Unreadable("a side of an equation is not an expression")


def _name_of(text: str) -> str:
    return re.sub(r"[\s{}⟦⟧\\]", "", text)


def _inequality(sides: list[Tree], signs: list[str]) -> Value:
    if any(s not in ("<", ">", "\\le", "\\ge", "\\ne") for s in signs):
        raise Unreadable("a chain of different relations")
    is_name = [side[0] == "name" for side in sides]
    free = [any(p[0] == "name" for p in parts(side)) for side in sides]
    if len(sides) == 2 and (is_name[0] and not free[1]):
        return _ray(sides[0][1], signs[0], sides[1])
    if len(sides) == 2 and (is_name[1] and not free[0]):
        turned = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
        return _ray(sides[1][1], turned[signs[0]], sides[0])
    if len(sides) == 3 and is_name[1] and not free[0] and not free[2]:
        for low, high, up in ((0, 2, ("<", "\\le")), (2, 0, (">", "\\ge"))):
            if all(s in up for s in signs):
                closed = [s != up[0] for s in signs]
                ends = closed if low == 0 else closed[::-1]
                return Reals((Span(sides[low], sides[high], ends[0], ends[1]),), sides[1][1])
    if len(sides) != 2:
        raise Unreadable("a chain of inequalities that is not an interval")
    left, right = sides if signs[0] in (">", "\\ge", "\\ne") else sides[::-1]
    sign = {"<": ">", ">": ">", "\\le": ">=", "\\ge": ">=", "\\ne": "!="}[signs[0]]
    return Relation(sign, ("+", left, ("neg", right)))


def _ray(name: str, sign: str, end: Tree) -> Reals:
    low: Tree = ("neg", INFINITY)
    if sign == "\\ne":
        return Reals((Span(low, end, False, False), Span(end, INFINITY, False, False)), name)
    if sign in ("<", "\\le"):
        return Reals((Span(low, end, False, sign == "\\le"),), name)
    return Reals((Span(end, INFINITY, sign == "\\ge", False),), name)


def _operand(text: str) -> Value:
    """A set, a tuple, a matrix, a text or an expression."""
    value = from_words(text)
    if value is not None:
        return value
    if text.startswith(("\\emptyset", "\\mathbb{R}")) and text in ("\\emptyset", "\\mathbb{R}"):
        return Several("set", ()) if text == "\\emptyset" else REALS
    pieces, unions = cut(text, _UNION)
    if unions:
        spans = [span for piece in pieces for span in _spans(as_interval(_operand(piece)))]
        return Reals(tuple(spans))
    pieces, without = cut(text, _WITHOUT)
    if len(without) == 1 and pieces[0] == "\\mathbb{R}":
        return _all_but(_operand(pieces[1]))
    if match := _MATRIX.fullmatch(text):
        return _matrix(match[1], match[2], match[3], match[4])
    if text.startswith("{") and text.endswith("}") and "," in text:
        text = f"\\{text[:-1]}\\}}"  # {1, 2}: a set whose braces lost their backslashes
    bracket = whole_bracket(text)
    if bracket is not None:
        value = _bracketed(*bracket)
        if value is not None:
            return value
    return _quantity(text)


def _bracketed(opening: str, inside: str, closing: str) -> Value | None:
    """A set, a tuple or an interval; None for a bracket around one expression."""
    if opening == "\\{":
        if closing != "\\}":
            raise Unreadable("brackets do not match")
        return _set(inside)
    found, separators = elements(inside, inside=True)
    if len(found) == 1 and opening in "([" and closing in ")]" and not (opening == "[" or closing == "]"):
        return None
    if any(s.strip(",;") for s in separators) or "" in found:
        raise Unreadable("a tuple with words or nothing between its commas")
    kind = "()" if opening == "\\langle" else opening + closing
    if (opening == "\\langle") != (closing == "\\rangle"):
        raise Unreadable("brackets do not match")
    return Several(kind, tuple(_one(element) for element in found))


def _set(inside: str) -> Value:
    if not inside:
        return Several("set", ())
    pieces, bars = cut(inside, _SUCH_THAT)
    if len(bars) == 1 and (condition := re.fullmatch(r"([A-Za-z])(?:\s*\\in\s*\\mathbb\{R\})?", pieces[0])):
        value = _list(pieces[1])
        if isinstance(value, Reals) and value.name == condition[1]:
            return replace(value, name="")
        raise Unreadable("a set by a condition that is not an interval")
    found, _ = elements(inside, inside=True)
    if "" in found:
        raise Unreadable("an element of a set is missing")
    return _flat([_one(element) for element in found], "set")


def as_interval(value: Value) -> Value:
    """A pair in brackets as an interval; other values unchanged."""
    if isinstance(value, Several) and len(value.kind) == 2 and len(value.items) == 2:
        ends = [item.tree for item in value.items if isinstance(item, Quantity) and not item.unit]
        if len(ends) == 2:
            return Reals((Span(ends[0], ends[1], value.kind[0] == "[", value.kind[1] == "]"),))
    return value


def _spans(value: Value) -> tuple[Span, ...]:
    if isinstance(value, Reals):
        return value.spans
    if isinstance(value, Several) and value.kind == "set":
        points = [item.tree for item in value.items if isinstance(item, Quantity)]
        if len(points) == len(value.items):
            return tuple(Span(point, point, True, True) for point in points)
    raise Unreadable("a union of values that are not sets of numbers")


def _all_but(value: Value) -> Value:
    points = sorted(p for span in _spans(value) if (p := exact(span.low)) is not None and span.low == span.high)
    if len(points) != len(_spans(value)):
        raise Unreadable("all numbers except a set whose values cannot be ordered")
    ends: list[Tree] = [("neg", INFINITY), *(("num", p) for p in points), INFINITY]
    return Reals(tuple(Span(low, high, False, False) for low, high in pairwise(ends)))


def _matrix(opening: str, environment: str, body: str, closing: str) -> Value:
    rows = [
        tuple(parse(cell.strip()) for cell in row.split("&"))
        for row in body.split("\\\\")
        if row.replace("\\hline", "").strip()
    ]
    if not rows or len({len(row) for row in rows}) > 1:
        raise Unreadable("rows of a matrix differ in length")
    bars = environment == "vmatrix" or opening == closing == "|"
    return Matrix("determinant" if bars else "matrix", tuple(rows))


def _quantity(text: str) -> Value:
    """An expression with its percent sign or unit."""
    if match := _ORDINAL.fullmatch(text):
        return Quantity(("num", Fraction(match[1])), unit="th")
    number, factor, rest = split_magnitude(text)
    math, unit = split_unit(number if factor != 1 else text)
    if factor != 1:
        if rest:
            probe, behind = split_unit(f"1 {rest}")
            if probe != "1" or (unit and behind and unit != behind):
                raise Unreadable(f"{rest!r} behind a number is not a unit")
            unit = unit or behind
        return Quantity(("*", parse(math), ("num", factor)), unit=unit)
    percent = math.endswith("%") or unit == ""
    if math.endswith("%"):
        math = math[:-1].strip()
    elif match := re.fullmatch(r"(.*\S)\s*⟦?\s*(?:percent|per cent)\s*⟧?", math):
        math = match[1].strip()
    else:
        percent = False
    tree = parse(math)
    if tree[0] == "deg":
        tree, unit = tree[1], unit or "deg"
    elif tree[0] == "neg" and tree[1][0] == "deg":
        tree, unit = ("neg", tree[1][1]), unit or "deg"
    if percent and unit:
        raise Unreadable("a percentage with a unit")
    if has_sign_choice(tree):
        return Several("any", tuple(Quantity(with_signs(tree, upper), percent, unit) for upper in (True, False)))
    exact(tree)  # raises on a division by zero
    return Quantity(tree, percent, unit)
