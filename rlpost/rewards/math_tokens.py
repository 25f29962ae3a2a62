"""Tokens of an expression: numbers, letters, commands and signs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlpost.rewards.math_text import GREEK, Unreadable

FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "exp")
)
_SPELLINGS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_NO_PRODUCT = (*FUNCTIONS, "log", "sqrt", "pi", "gcd", "lcm", "max", "min", "mod", "det", "lim", "sup", "inf", "arg")
"""Letters that begin with one of these are not a product of letters."""

_TOKEN = re.compile(
    r"(?P<space>\s*)(?:"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d*\.\d*\\overline\s*\{\s*\d+\s*\}|\d*\.\d+|\d+\.?)"
    r"(?P<power>[eE][+-]?\d{1,4}(?![\w.]))?"
    r"|(?P<command>\\[A-Za-z]+|\\[{}|])"
    r"|(?P<letters>[A-Za-z]+)"
    r"|(?P<text>⟦[^⟦⟧]*⟧)"
    r"|(?P<sign>[-+*/^_!|(){}\[\]'])"
    r")"
)


@dataclass
class Token:
    """A token of an expression."""

    kind: str
    """`number`, `command`, `name`, `function`, `sign` or `text`."""
    text: str
    apart: bool
    """Whether a space stands before it."""
    start: int = 0


def tokens(text: str) -> list[Token]:
    """The tokens of a normalised text.

    Raises:
        Unreadable: a sign is unknown.
    """
    found: list[Token] = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.end() == at:
            raise Unreadable(f"{text[at : at + 10].strip()!r} is not read as mathematics")
        apart, start = bool(match["space"]), match.end("space")
        if match["number"]:
            found.append(Token("number", match["number"] + (match["power"] or ""), apart, start))
        elif match["letters"]:
            found += _letters(match["letters"], apart, start)
        else:
            kind = "command" if match["command"] else "text" if match["text"] else "sign"
            found.append(Token(kind, match[0].strip(), apart, start))
        at = match.end()
    return found


def _letters(run: str, apart: bool, start: int) -> list[Token]:
    """Letters without a backslash: a function's name, pi, a Greek letter, or single letters multiplied."""
    name = _SPELLINGS.get(run, run)
    if name in FUNCTIONS or name in ("log", "sqrt"):
        return [Token("function", name, apart, start)]
    if run in ("pi", "infinity", "infty") or run in GREEK:
        return [Token("command", "\\infty" if run == "infinity" else f"\\{run}", apart, start)]
    if len(run) > 3 or run.startswith(_NO_PRODUCT):
        raise Unreadable(f"{run!r} is not a product of letters: write spaces or signs between them, or \\text{{}}")
    return [Token("name", letter, apart and i == 0, start + i) for i, letter in enumerate(run)]
