"""Finds the final answer in a text, and compares plain numbers exactly; without computer algebra."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from rlpost.errors import RecipeError
from rlpost.rewards.math_text import without_dollars
from rlpost.suggest import hint_or_list

MARKED = ("hashes", "boxed", "phrase")
"""Ways to find an answer that is marked as final, in the order in which they are tried."""

LONGEST = 1000
"""Characters; no answer we can compare is longer, and Python refuses to read numbers beyond 4,300 digits."""

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}})?"
_NUMBER = re.compile(
    rf"([+-]?)\s*(?:({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?"
    rf"|\\frac\s*(?:\{{\s*({_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}}|([0-9])\s*([0-9])))\s*(\\?%)?"
)
# A minus after a digit, a letter or a bracket is a subtraction: the last number of "7-5" is 5.
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w)\]}}])[-−])?(?:\\frac\s*\{{\s*{_DECIMAL}\s*\}}\s*\{{\s*{_DECIMAL}\s*\}}|{_DECIMAL}"
    rf"(?:\s?(?:[×*]|\\times|\\cdot)\s?10\s?\^\s?(?:\{{\s?[-−]?[0-9]{{1,3}}\s?\}}|[-−]?[0-9]{{1,3}})"
    r"|(?:\s[0-9]+)?/[0-9]+|\s?\\?%|\s(?:hundred|thousand|million|billion|trillion)\b)?)"
)
_PHRASE = re.compile(
    r"(?:^[ \t]*[#*]+[ \t]*(?:final[ \t]+)?answer[ \t]*[*#]*[ \t]*$|"
    r"answers?\**(?:\s+(?:to|for)\s[^\n.:=]{1,80}?)?(?:\s+(?:is|are|equals|would\s+be|must\s+be)\b|\s*[:=])\s*[:=]?)"
    r"(?:\s|\$\$(?!\S)|\\\[(?!\S)|\*\*)*",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"\n|[.?](?=\s)|!(?=\s+[A-Z])")
_REASON = re.compile(r",?\s+(?:because|since|which|where|so|as|but)\b|\s[—–]\s", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[ \t$]*(?:(,|;)[ \t$]*)?(?:\\text\{)?\s*(and|or)?\s*\}?[ \t$]*")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_SIZES = re.compile(r"\\(?:left|right)(?![a-z])")
_EMPHASIS = re.compile(r"(?<![\w)])\*\*([^*\n]+)\*\*(?![\w(])")


@dataclass(frozen=True)
class Number:
    """A plain number, exactly."""

    value: Fraction
    percent: bool = False
    """Written with a percent sign, which `value` ignores: 50% has the value 50."""

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
        answer = None if found is None else tidy(found) if len(found) <= 4 * LONGEST else found
        if answer:
            return answer
    return None


def tidy(text: str) -> str:
    """The text of an answer without box, dollar signs of mathematics, emphasis, and a closing full stop."""
    text = without_dollars(_SIZES.sub("", _unboxed(text)))
    text = _EMPHASIS.sub(r"\1", text).strip("* \n\t")
    text = _TEXT.sub(r"\1", text) if _TEXT.fullmatch(text) else text
    text = text.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"(?:\\[,;:! ]|[,;:\s])+$", "", " ".join(text.split()))
    return text if text.endswith("..") else text.removesuffix(".").rstrip(",;: ")


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


def _hashes(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0] if mark else None


def _boxed(text: str) -> str | None:
    """The content of the last box: the outermost if they are nested, both of two joined by a comma."""
    if "boxed" not in text and "fbox" not in text:
        return None
    boxes, unclosed = _boxes(text)
    if not boxes or any(start > boxes[-1][2] for start in unclosed):
        return None
    (begin, inside, end), *earlier = reversed(boxes)
    answer = text[inside:end]
    for start, from_, to in earlier:
        between = _BETWEEN_BOXES.fullmatch(text, to + 1, begin) if to < begin < to + 40 else None
        if between is None or not (between[1] or between[2]):
            break
        answer = f"{text[from_:to]} {between[2] or ','} {answer}".replace(" , ", ", ")
        begin = start
    return answer


def _unboxed(text: str) -> str:
    """The text with its boxes opened: `x = \\boxed{5}` is `x = 5`."""
    for _ in range(4):
        for start, inside, end in reversed(_boxes(text)[0]):
            text = text[:start] + text[inside:end] + text[end + 1 :]
    return text


def _boxes(text: str) -> tuple[list[tuple[int, int, int]], list[int]]:
    """(start, start of the content, its end) of every closed outermost box; starts of unclosed ones."""
    opened: list[tuple[int, int] | None] = []
    closed: list[tuple[int, int, int]] = []
    for match in _BOX.finditer(text):
        sign = match[0]
        if sign == "{":
            opened.append(None)
        elif sign == "}":
            box = opened.pop() if opened else None
            if box is not None:
                while closed and closed[-1][0] > box[0]:
                    closed.pop()
                closed.append((*box, match.start()))
        elif len(sign) > 2:
            opened.append((match.start(), match.end()))
    return closed, [box[0] for box in opened if box is not None]


def _phrase(text: str) -> str | None:
    """The text after the last announcement; "I hope the answer is correct" is none."""
    found = None
    for match in _PHRASE.finditer(text):
        end = _SENTENCE_END.search(text, match.end())
        rest = text[match.end() : end.start() if end else len(text)].strip()
        if rest.casefold().rstrip(".!") != "correct":
            found = rest
    if found is None:
        return None
    reason = _REASON.search(found, 1)
    found = found if reason is None else found[: reason.start()]
    # "The answer is 5!" may mean 120, or just an exclamation; inside $ $ it is mathematics.
    return None if re.search(r"[\w)]!$", found) else found


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
