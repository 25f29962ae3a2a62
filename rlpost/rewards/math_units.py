"""What follows a number: units, things counted, words of magnitude. Units are compared, not converted."""

from __future__ import annotations

import re
from fractions import Fraction

_NAMES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "g": "gram gramme gm", "mg": "milligram",
    "kg": "kilogram kilo", "lb": "pound", "oz": "ounce", "l": "liter litre L", "ml": "milliliter millilitre mL",
    "s": "second sec", "min": "minute", "h": "hour hr", "day": "d", "week": "wk", "month": "mo", "year": "yr",
    "n": "newton N", "j": "joule J", "w": "watt W", "v": "volt V", "hz": "hertz Hz", "pa": "pascal Pa",
    "k": "kelvin K", "mol": "mole", "dollar": "$ usd buck", "£": "gbp", "€": "euro eur", "¥": "yen",
    "¢": "cent", "deg": "degree °", "rad": "radian", "unit": "", "mph": "", "kph": "kmh", "sq": "square",
    "ppm": "", "gb": "gigabyte", "mb": "megabyte", "kb": "kilobyte", "ton": "tonne", "celsius": "",
    "fahrenheit": "", "cup": "", "person": "people",
}  # fmt: skip
_CANONICAL = {spelling: name for name, others in _NAMES.items() for spelling in (name, *others.split())}
_SHORT = {"m", "g", "s", "h", "L", "l", "N", "J", "W", "V", "K"}
"""Units of one letter; read as such only behind a space or in `\\text{}`."""
MAGNITUDES = {
    **dict.fromkeys(("hundred", "hundreds"), 2),
    **dict.fromkeys(("thousand", "thousands"), 3),
    **dict.fromkeys(("million", "millions"), 6),
    **dict.fromkeys(("billion", "billions"), 9),
    **dict.fromkeys(("trillion", "trillions"), 12),
}
_MULTIPLES = {**{word: Fraction(10) ** power for word, power in MAGNITUDES.items()}, "dozen": Fraction(12)}
_SAYS_MORE = (
    "and or to of than then less more times plus minus not no half halves third thirds quarter quarters fourth "
    "fourths fifth fifths sixth sixths eighth eighths tenth tenths hundredth hundredths over point short below above "
    "under negative positive remainder pi sin cos tan cot sec csc ln log exp sqrt arcsin arccos arctan infinity "
    "squared cubed if when where for but either neither between through until at about nor is are was were equals "
    "equal base mod divided multiplied power root one two three four five six seven eight nine ten eleven twelve "
    "twenty thirty forty fifty sixty seventy eighty ninety score pair pairs gross dozens percent percentage th st nd "
    "rd am pm x y z alpha beta gamma delta theta lambda factorial choose modulo double twice triple thrice quadruple "
    "tens ones lakh lakhs crore crores bn mil mn googol fold wrong incorrect false nope never except without "
    "reciprocal inverse opposite quadrillion"
)
"""Words of magnitude and their powers of ten."""
_NOT_A_THING = frozenset(_SAYS_MORE.split())
_PART = re.compile(r"\w*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)ths?")
"""Twentieths and the like."""
_WORD = r"(?:⟦[^⟦⟧]*⟧|[A-Za-zÀ-ɏ]++\.?|[$£€¥¢])"  # ++: without backtracking, which would take exponential time
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))"
_TAIL = re.compile(
    rf"(?P<gap>\s*)(?P<unit>(?:\^\\circ\s*)?{_WORD}?{_POWER}?(?:(?:\s*/\s*|\s*\*\s*|\s+|-)?{_WORD}{_POWER}?){{0,5}}"
    rf"|\\frac\{{\s*⟦[^⟦⟧]*⟧{_POWER}?\s*\}}\{{\s*⟦[^⟦⟧]*⟧{_POWER}?\s*\}})\s*$"
)
_END = re.compile(r"[0-9})\]!|%.]|\S(?=\s*⟦)")


def split_unit(text: str) -> tuple[str, str]:
    """(`5`, `cm^2`) of `5 ⟦cm⟧^2`; the unit is "" where there is none."""
    money = re.match(r"(-?)\s*(?:(\\?\$|[£€¥])\s*(-?))(?=[\d.])", text)
    if money:
        body = money[1] + money[3] + text[money.end() :]
        sign = _CANONICAL[money[2].lstrip("\\")]
        math, behind = split_unit(body)
        return (math, sign) if behind in ("", sign) else (text, "")
    # The tail begins right behind the last sign that can end a number; ° alone is part of the expression.
    for end in sorted({m.end() for m in _END.finditer(text)}, reverse=True):
        tail = _TAIL.match(text, end)
        if (
            tail is not None
            and tail["unit"].strip() != "^\\circ"
            and tail["unit"]
            and (unit := _unit(tail["unit"], bool(tail["gap"])))
        ):
            return text[:end].strip(), unit
    return text, ""


def split_magnitude(text: str) -> tuple[str, Fraction, str]:
    """(`5`, 1000000, `dollars`) of `5 million dollars`: the number, what to multiply it by, and the rest."""
    match = re.fullmatch(
        r"(.*?[0-9})])[\s-]*⟦?\s*(hundred|thousand|million|billion|trillion|dozen)s?\b\s*((?:of\s+)?[^0-9]*)",
        text,
        re.IGNORECASE,
    )
    if match is None:
        return text, Fraction(1), ""
    rest = match[3].strip().strip("⟦⟧").strip()
    more = re.match(r"(hundred|thousand|million|billion|trillion)s?\b\s*(.*)", rest, re.IGNORECASE)
    factor = _MULTIPLES[match[2].lower()]
    if more:
        factor, rest = factor * _MULTIPLES[more[1].lower()], more[2]
    return match[1], factor, re.sub(r"^of\s+", "", rest)


def _unit(text: str, apart: bool) -> str | None:
    """A unit or a thing counted in one spelling; None for other texts."""
    in_text = "⟦" in text
    text = re.sub(r"\\frac\{(.*?)\}\{(.*)\}", r"\1/\2", text)
    text = re.sub(r"\^\\circ\s*⟦?\s*([CF])\b", lambda m: {"C": " celsius", "F": " fahrenheit"}[m[1]], text)
    text = re.sub(r"\^\\circ\s*", " ° ", text).replace("⟦", " ").replace("⟧", " ")
    text = re.sub(r"\bper\b", "/", text)
    text = re.sub(r"\^\s*\{?\s*(-?\d)\s*\}?", r"^\1", text)
    pieces = re.findall(r"[^\W\d_]+|\^-?\d|[/$£€¥¢°]|\S", text)
    words: list[str] = []
    for piece in pieces:
        if re.fullmatch(r"\^-?\d|/", piece):
            words.append(piece)
        elif piece in "*.-":
            continue
        elif (word := _word(piece, apart, in_text)) is None:
            return None
        else:
            words.append(word)
    return _arranged(words)


def _word(piece: str, apart: bool, in_text: bool) -> str | None:
    folded = piece.casefold()
    if folded in ("squared", "cubed"):
        return "^2" if folded == "squared" else "^3"
    if len(piece) == 1 and piece.isalpha():
        known = piece in _SHORT and apart
        return _CANONICAL.get(piece, folded) if known or in_text else None
    if folded in _NOT_A_THING or _PART.fullmatch(folded):
        return None
    for spelling in (piece, folded, folded.removesuffix("s")):
        if spelling in _CANONICAL:
            return _CANONICAL[spelling]
    if folded in ("cubic", "cu"):
        return "cubic"
    # An unknown word is a thing counted, unless it may be a product of variables.
    if not (in_text or (apart and len(piece) >= 3)):
        return None
    return folded.removesuffix("s")


def _arranged(words: list[str]) -> str | None:
    """The spelling that `sq cm` and `cm^2` share; `° C` as one unit."""
    found: list[str] = []
    raised = ""
    for word in words:
        if word in ("sq", "cubic"):
            raised = "^2" if word == "sq" else "^3"
        elif word.startswith("^") or word == "/":
            found.append(word)
        else:
            found.append(word + raised)
            raised = ""
    text = " ".join(found).replace(" ^", "^").replace(" / ", "/")
    if text.startswith(("^", "/")) or text.endswith("/") or not text:
        return None
    return {"deg c": "celsius", "deg f": "fahrenheit", "deg celsiu": "celsius", "deg fahrenheit": "fahrenheit"}.get(
        text, {"km/h": "kph", "mi/h": "mph"}.get(text, text)
    )
