"""Split a text of mathematics at commas, "and", relations and unions outside of brackets."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlpost.rewards.math_expressions import DEEPEST
from rlpost.rewards.math_text import Unreadable

_BRACKET = re.compile(r"\\[{}]|\\langle(?![a-zA-Z])|\\rangle(?![a-zA-Z])|\\begin\{|\\end\{|[()\[\]{}⟦⟧]")
_OPENING = {"(": 1, "[": 1, "\\{": 2, "{": 3, "\\langle": 4, "\\begin{": 5, "⟦": 6}
_CLOSING = {")": 1, "]": 1, "\\}": 2, "}": 3, "\\rangle": 4, "\\end{": 5, "⟧": 6}
_DIGIT_RUN = re.compile(r"(?<![\d.])\d+(?:,\d+)+")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")
_SEPARATOR = re.compile(r"[,;]\s*(?:(?:and|or)\b)?|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")


def outside(text: str) -> list[bool]:
    """For every character, whether it is outside of all brackets and no bracket itself.

    Raises:
        Unreadable: brackets do not match.
    """
    free = [True] * len(text)
    opened: list[tuple[int, int]] = []
    skip_name = 0
    for match in _BRACKET.finditer(text):
        if match.start() < skip_name:
            continue
        kind = match[0]
        if kind in ("\\begin{", "\\end{"):
            skip_name = text.find("}", match.end()) + 1
            if skip_name == 0:
                raise Unreadable("a bracket is never closed")
        if kind in _OPENING:
            opened.append((_OPENING[kind], match.start()))
            if len(opened) > DEEPEST:
                raise Unreadable(f"nested more than {DEEPEST} deep")
            continue
        if not opened or opened[-1][0] != _CLOSING[kind]:
            raise Unreadable("brackets do not match")
        _, start = opened.pop()
        end = max(match.end(), skip_name)
        free[start:end] = [False] * (end - start)
    if opened:
        raise Unreadable("a bracket is never closed")
    return free


def whole_bracket(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) of a text that is one bracket as a whole; None for other texts."""
    for opening in ("\\{", "\\langle", "(", "["):
        if text.startswith(opening):
            free = outside(text)
            if any(free):
                return None
            closing = next((c for c in ("\\}", "\\rangle", ")", "]") if text.endswith(c)), None)
            if closing is None:
                return None
            inside = text[len(opening) : len(text) - len(closing)]
            try:
                outside(inside)
            except Unreadable:
                return None  # (a)(b): the first bracket closes before the end
            return opening, inside.strip(), closing
    return None


def elements(text: str, inside: bool) -> tuple[list[str], list[str]]:
    """(elements, separators between them) of a list; `inside`: in a bracket, where a comma before a digit separates.

    Raises:
        Unreadable: a comma may group thousands or separate.
    """
    free = outside(text)
    grouping = set(_grouping_commas(text, free, inside))
    found, separators = [], []
    start = 0
    for match in _SEPARATOR.finditer(text):
        if match.start() in grouping or not free[match.start()]:
            continue
        found.append(text[start : match.start()].strip())
        separators.append(match[0].replace(" ", ""))
        start = match.end()
    found.append(text[start:].strip())
    if len(found) > 1 and found[-1] == "" and separators[-1] in (",", ";"):
        found.pop()
        separators.pop()
    return found, separators


def _grouping_commas(text: str, free: list[bool], inside: bool) -> Iterator[int]:
    """Commas that belong to a number like 1,234."""
    spaced = any(free[m.start()] for m in re.finditer(r"[,;]\s", text))
    for match in _DIGIT_RUN.finditer(text):
        if not free[match.start()] or (inside and not spaced):
            continue
        if _THOUSANDS.fullmatch(match[0]):
            yield from (match.start() + i for i, sign in enumerate(match[0]) if sign == ",")
        elif any(len(group) == 3 for group in match[0].split(",")[1:]):
            raise Unreadable(
                f"the commas of {match[0]!r} may group thousands or separate: write a space behind those that separate"
            )


def cut(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """(pieces, the matches between them) of a text split at a pattern outside of brackets."""
    free = outside(text)
    pieces, between = [], []
    start = 0
    for match in pattern.finditer(text):
        if free[match.start()]:
            pieces.append(text[start : match.start()].strip())
            between.append(match[0].strip())
            start = match.end()
    return [*pieces, text[start:].strip()], between
