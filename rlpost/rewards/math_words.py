"""Read answers that are not expressions: numbers in words, choices, dates, times, ratios, digits in a base."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from rlpost.rewards.math_expressions import Tree, parse
from rlpost.rewards.math_text import GREEK, Unreadable
from rlpost.rewards.math_tokens import FUNCTIONS
from rlpost.rewards.math_units import MAGNITUDES
from rlpost.rewards.math_values import Exactly, InBase, Quantity, Reals, Several, Span, Value, Words

INFINITY: Tree = ("inf",)
REALS = Reals((Span(("neg", INFINITY), INFINITY, False, False),))

_UNDER_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_SMALL = {word: number for number, word in enumerate(_UNDER_TWENTY.split())}
_ROUND = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: number * 10 for number, word in enumerate(_ROUND.split(), start=2)}
_PHRASES: dict[str, Value] = {
    "infinity": Quantity(INFINITY), "positive infinity": Quantity(INFINITY), "plus infinity": Quantity(INFINITY),
    "negative infinity": Quantity(("neg", INFINITY)), "minus infinity": Quantity(("neg", INFINITY)),
    "all real numbers": REALS, "all reals": REALS, "the real numbers": REALS, "all numbers": REALS,
    "empty set": Several("set", ()), "the empty set": Several("set", ()),
    "half": Quantity(("num", Fraction(1, 2))), "one half": Quantity(("num", Fraction(1, 2))),
    "a half": Quantity(("num", Fraction(1, 2))), "one third": Quantity(("num", Fraction(1, 3))),
    "two thirds": Quantity(("num", Fraction(2, 3))), "one quarter": Quantity(("num", Fraction(1, 4))),
    "three quarters": Quantity(("num", Fraction(3, 4))),
}  # fmt: skip
_MONTH_NAMES = (
    "january jan|february feb|march mar|april apr|may|june jun|july jul|august aug|september sep sept|october oct|"
    "november nov|december dec"
)
_MONTHS = {name: number for number, names in enumerate(_MONTH_NAMES.split("|"), start=1) for name in names.split()}
_MONTH = rf"(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_DATES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_MONTH} {_DAY}(?:,? (?P<year>\d{{4}}))?",
        rf"{_DAY} (?:of )?{_MONTH}(?:,? (?P<year>\d{{4}}))?",
        r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})",
    )
)
_SLASHED = re.compile(r"\d{1,2}/\d{1,2}/\d{2,4}")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*([ap])\.?\s?m\.?")
_CLOCK_ALONE = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")
_BASE = re.compile(r"⟦?([0-9A-Za-z]+)⟧?\s*_\s*(\d+|⟦\s*[a-z]+\s*⟧|\{\s*(?:\d+|⟦?\s*[a-z]+\s*⟧?)\s*\})")
_BASE_IN_WORDS = re.compile(r"([0-9A-F]+)\s*\(?\s*(?:in )?base (\d+|[a-z]+)\s*\)?")
_LETTERS_OF_CHOICES = "A-Ja-j"
_CHOICE = (
    re.compile(
        rf"(?:(?:option|choice|answer)\s+)?\(\s*([{_LETTERS_OF_CHOICES}])\s*\)(?:\s*[.:]?\s+(.+)|\s*[.:]?)", re.I
    ),
    re.compile(rf"(?:option|choice)\s+([{_LETTERS_OF_CHOICES}])(?:\s*[).:]?\s+(.+)|\s*[).:]?)", re.I),
    re.compile(r"([A-J])\s*(?:[).:](?:\s+(.+))?)"),
)
_PRODUCT = re.compile(r"[a-z]{2,3}|[A-Z]{2,3}")
_YES_NO = re.compile(r"(yes|no|true|false)\s*[,.;:!]\s+(.+)", re.S)
_WORDS = re.compile(r"[^\W\d_]+(?:[\s'.,/&-]+[^\W\d_]+)*[.!]?")
_NAMED = re.compile(r"(?=[^\W\d_]{2})[^\W\d_]+(?:[\s'-]+[^\W_]+)*")


def from_words(text: str) -> Value | None:
    """The value of a text in words, of a date, a time, a ratio, or digits in a base; None for other texts.

    Raises:
        Unreadable: a digit is not in the base.
    """
    bare = " ".join(text.replace("⟦", " ").replace("⟧", " ").replace('"', " ").split())
    folded = bare.casefold()
    return (
        _PHRASES.get(folded)
        or _in_base(text)
        or _date(folded)
        or _time(folded)
        or _ratio(folded)
        or number_word(folded)
        or _words(text, bare)
    )


def choice(text: str) -> tuple[str, str] | None:
    """(letter, the rest) of `(B) 12`, `B. 12` or `option B`; None for other texts."""
    bare = " ".join(text.replace("⟦", " ").replace("⟧", " ").split())
    for pattern in _CHOICE:
        if match := pattern.fullmatch(bare):
            return match[1].upper(), match[2] or ""
    return None


def _words(text: str, bare: str) -> Value | None:
    if len(bare) == 1:
        return None
    first = _YES_NO.fullmatch(bare.casefold())
    if first and not re.search(r"\b(?:yes|no|not|true|false|but|however)\b", first[2]):
        return Words(first[1])
    if _WORDS.fullmatch(bare):
        if _is_mathematics(bare) and "⟦" not in text:
            return None
        product = None
        if _PRODUCT.fullmatch(bare) and "⟦" not in text and bare.casefold() not in ("yes", "no"):
            product = _product(bare)
        return Words(plain_words(bare), product)
    # "Day 3" and "Room 12B" are names; "5 apples" begins with a number and is none.
    if _NAMED.fullmatch(bare) and not _is_mathematics(bare):
        return Words(plain_words(bare))
    return None


def plain_words(text: str) -> str:
    """Words without punctuation and article, in lower case; up to three capitals stay as they are."""
    words = re.sub(r"[^\w\s'/&]|_", " ", text).split()
    if len(words) > 1 and words[0].casefold() in ("the", "a", "an"):
        words = words[1:]
    if len(words) > 1 and len(words[-1]) > 3:
        words[-1] = words[-1].removesuffix("s")  # no solutions, no solution
    joined = " ".join(words)
    # AB and ab, HT and ht are different things; NO and no are not.
    if len(joined) <= 3 and joined.isupper() and joined.casefold() not in ("yes", "no"):
        return joined
    return joined.casefold()


def _is_mathematics(text: str) -> bool:
    words = re.findall(r"[^\W\d_]+", text)
    names = {"pi", "log", "sqrt", "infinity", *FUNCTIONS, *GREEK}
    if len(words) == 1:
        return words[0] in names or any(words[0].startswith(f) and len(words[0]) <= len(f) + 2 for f in FUNCTIONS)
    # "x or y", "a and b": letters, not words
    return any(word in names for word in words) or all(len(w) == 1 or w in ("and", "or") for w in words)


def _product(letters: str) -> Tree | None:
    try:
        return parse(letters)
    except Unreadable:
        return None


def number_word(text: str) -> Value | None:
    """The whole number that the words spell, or None."""
    minus = re.match(r"(?:negative|minus) ", text)
    words = re.sub(r"[-,]|\band\b", " ", text[minus.end() :] if minus else text).split()
    total, group = 0, None
    for word in words:
        if word in _SMALL:
            small = _SMALL[word]
            if group is not None and (group % 10 or (group % 100 and small > 9) or not group):
                return None
            group = (group or 0) + small
        elif word in _TENS:
            if group is not None and (group % 100 or not group):
                return None
            group = (group or 0) + _TENS[word]
        elif word == "hundred" and group is not None and group < 10:
            group *= 100
        elif word in MAGNITUDES and MAGNITUDES[word] > 2 and group is not None:
            factor = 10 ** MAGNITUDES[word]
            if total and total % (factor * 1000):
                return None
            total, group = total + group * factor, None
        else:
            return None
    if not words:
        return None
    return Quantity(("num", Fraction((-1 if minus else 1) * (total + (group or 0)))))


def _in_base(text: str) -> Value | None:
    match = _BASE.fullmatch(text) or _BASE_IN_WORDS.fullmatch(text.replace("⟦", "").replace("⟧", ""))
    if match is None or not (match[1][0].isdigit() or ("⟦" in text and match[1].isupper())):
        return None
    written = match[2].strip("{}⟦⟧ ")
    word = number_word(written)
    base = int(written) if written.isdigit() else int(word.tree[1]) if isinstance(word, Quantity) else 0
    if not 2 <= base <= 36:
        raise Unreadable(f"{written!r} is not a base from 2 to 36")
    digits = match[1].upper().lstrip("0") or "0"
    if any(int(digit, 36) >= base for digit in digits):
        raise Unreadable(f"{match[1]!r} has digits that base {base} does not have")
    return Quantity(("num", Fraction(int(digits)))) if base == 10 else InBase(digits, base)


def _date(text: str) -> Value | None:
    if _SLASHED.fullmatch(text):
        return Exactly("date as written", (text,))
    for pattern in _DATES:
        if match := pattern.fullmatch(text):
            given = match.groupdict()
            month = _MONTHS.get(given["month"]) or int(given["month"])
            return Exactly("date", (month, int(given["day"]), int(given["year"] or 0)))
    return None


def _time(text: str) -> Value | None:
    if match := _CLOCK.fullmatch(text):
        hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
        if not 1 <= hour <= 12 or minute > 59 or second > 59:
            return None
        return Exactly("time", (hour % 12 + (12 if match[4] == "p" else 0), minute, second))
    if match := _CLOCK_ALONE.fullmatch(text):
        hour, minute, second = int(match[1]), int(match[2]), int(match[3] or 0)
        if hour < 24 and minute < 60 and second < 60:
            # 15:30 and 00:30 can only be one time of the day; 3:30 may be two, or a ratio.
            sure = hour > 12 or match[1] == "00"
            minutes_only = match[2].startswith("0")  # 3:05 is not a ratio
            return Exactly("time" if sure else "hours" if minutes_only else "clock", (hour, minute, second))
    return None


def _ratio(text: str) -> Value | None:
    if not _RATIO.fullmatch(text):
        return None
    terms = [int(t) for t in text.split(":")]
    common = math.gcd(*terms) or 1
    return Exactly("ratio", tuple(t // common for t in terms))
