"""Finding the final answer in a text, and comparing plain numbers exactly. No computer algebra here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rlpost.errors import RecipeError
from rlpost.recipe.suggest import hint_or_list

MARKED = ("hashes", "boxed", "phrase")
"""Ways to find an answer that its writer has marked as final, in the order they are tried."""

LONGEST = 1000
"""Characters; no answer we can compare is longer, and Python refuses to read numbers beyond 4,300 digits."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}})?"
_NUMBER = re.compile(
    rf"([+-]?)\s*(?:({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?"
    rf"|\\frac\s*(?:\{{\s*({_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}}|([0-9])\s*([0-9])))\s*(\\?%)?"
)
# A minus after a digit, a letter or a bracket is a subtraction: the last number of "7-5" is 5.
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}])-)?{_DECIMAL}(?:/[0-9]+)?%?")
_PHRASE = re.compile(r"answer\**(?:\s+is\b|\s*[:=])\s*[:=]?\s*([^\n]*)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.?](?=\s)|!(?=\s+[A-Z])")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
# `\\` ends a row of a matrix: what follows it is not a command.
_NOISE = re.compile(r"(?<!\\)\\[!,;: ()\[\]]|\\(?:left|right)(?![a-z])|\\?\$|[£€]")
_EMPHASIS = re.compile(r"(?<![\w)])\*\*([^*\n]+)\*\*(?![\w(])")


@dataclass(frozen=True)
class Number:
    """A plain number, exactly."""

    value: Fraction
    percent: bool = False
    """Written with a percent sign, which `value` does not take into account: 50% has the value 50."""

    def equals(self, other: Number) -> bool:
        """Equal as written, or as percentage and share: 50% equals 50, 1/2 and 0.5; 50 does not equal 0.5."""
        if self.percent == other.percent:
            return self.value == other.value
        percentage, plain = (self, other) if self.percent else (other, self)
        return plain.value in (percentage.value, percentage.value / 100)


def find_answer(text: str, find: str | Sequence[str] = MARKED) -> str | None:
    """The final answer in a text, tidied, by the first way in `find` that finds one; None if none does.

    `hashes`: the text after the last ####, to the end of its line. `boxed`: inside the last \\boxed{}.
    `phrase`: after the last "answer is" or "answer:", to the end of the sentence. `last_number`: the last
    number anywhere. `whole`: the whole text.

    Raises:
        RecipeError: `find` names an unknown way.
    """
    for name in [find] if isinstance(find, str) else find:
        if name not in _WAYS:
            hint = hint_or_list(name, _WAYS, "there are")
            raise RecipeError(f"math_answer: find: no way of finding answers is called {name!r}{hint}")
        found = _WAYS[name](text)
        answer = None if found is None else tidy(found)
        if answer:
            return answer
    return None


def tidy(text: str) -> str:
    """The text of an answer without box, money signs, emphasis, spacing commands and a closing full stop."""
    inner = _boxed(text)
    text = _EMPHASIS.sub(r"\1", _NOISE.sub("", text if inner is None else inner)).strip("* \n\t")
    text = _TEXT.sub(r"\1", text) if _TEXT.fullmatch(text) else text
    text = text.replace("{,}", ",").replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return " ".join(text.split()).rstrip(".,;: ")


def number(text: str) -> Number | None:
    """The plain number (integer, decimal, fraction, percentage) that a tidied text is, or None."""
    match = _NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if match is None:
        return None
    sign, above, below, frac_above, frac_below, short_above, short_below, percent = match.groups()
    numerator = Fraction((above or frac_above or short_above).replace(",", ""))
    denominator = Fraction((below or frac_below or short_below or "1").replace(",", ""))
    if denominator == 0:
        return None
    return Number((-1 if sign == "-" else 1) * numerator / denominator, percent is not None)


def canonical(text: str) -> str:
    """One spelling for equal plain numbers ("72.0" and "72" are "72"), no spaces otherwise; for votes."""
    text = tidy(text)
    exact = number(text)
    return "".join(text.split()) if exact is None else f"{exact.value}{'%' if exact.percent else ''}"


def _hashes(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0] if mark else None


def _boxed(text: str) -> str | None:
    opened = list(_BOX.finditer(text))
    if not opened:
        return None
    start = opened[-1].end()
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # \{ and \} are characters of the answer, not braces
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i]
        i += 1
    return None


def _phrase(text: str) -> str | None:
    found = _PHRASE.findall(text)
    return _SENTENCE_END.split(found[-1].strip(), maxsplit=1)[0] if found else None


def _last_number(text: str) -> str | None:
    found = _NUMBER_IN_TEXT.findall(text)
    return found[-1] if found else None


def _whole(text: str) -> str:
    return text


_WAYS: dict[str, Callable[[str], str | None]] = {
    "hashes": _hashes,
    "boxed": _boxed,
    "phrase": _phrase,
    "last_number": _last_number,
    "whole": _whole,
}
