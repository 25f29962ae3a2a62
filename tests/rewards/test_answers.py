from __future__ import annotations

from fractions import Fraction

import pytest

from rlpost.errors import RecipeError
from rlpost.rewards.answers import LONGEST, Number, find_answer, number, tidy


@pytest.mark.parametrize(
    ("text", "find", "expected"),
    [
        ("2+2=4\n#### 4", "hashes", "4"),
        ("#### 3\nno:\n#### $1,000.\nbye", "hashes", "$1,000"),
        ("so \\boxed{3} or rather \\boxed{\\frac{1}{2}}.", "boxed", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "boxed", "\\{1, 2\\}"),
        ("\\boxed{1 + \\boxed{", "boxed", None),
        ("The answer is 7. I am sure.", "phrase", "7"),
        ("**Answer:** $3.50$", "phrase", "3.50"),
        ("The final answer is: **12**", "phrase", "12"),
        ("answer is 1, no, the answer is $\\boxed{2}$.", "phrase", "2"),
        ("Answer:\n\n5", "phrase", "5"),
        ("from 3 apples and 1,200 pears, -7.5!", "last_number", "-7.5"),
        ("it is 7-5", "last_number", "5"),
        ("take 1 1/2 cups", "last_number", "1 1/2"),
        ("so 5 million people", "last_number", "5 million"),
        ("light: 3×10^8 m/s", "last_number", "3×10^8"),
        ("thus \\frac{1}{2} of them", "last_number", "\\frac{1}{2}"),
        ("half, 1/2 of it", "last_number", "1/2"),
        ("no numbers", "last_number", None),
        ("  x + 1 ", "whole", "x + 1"),
        ("  ", "whole", None),
        ("nothing marked, 5", ("hashes", "boxed", "phrase"), None),
        ("nothing marked, 5", ("hashes", "boxed", "phrase", "last_number"), "5"),
        ("####\n5\n", "hashes", "5"),
        ("The answer is 5\n####", ("hashes", "phrase"), "5"),
    ],
)
def test_find_answer(text: str, find: str | tuple[str, ...], expected: str | None):
    assert find_answer(text, find) == expected


def test_find_answer_knows_its_ways():
    with pytest.raises(RecipeError, match=r"'boxd' - did you mean 'boxed'\?"):
        find_answer("5", "boxd")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$5$", "5"),
        ("\\text{Evelyn}", "Evelyn"),
        ("5 \\text{ cm}", "5 \\text{ cm}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "( 3, \\frac{\\pi}{2} )"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("$x$ and $y$", "x and y"),
        ("$5 and $6", "$5 and $6"),
        ("1{,}000\\!", "1{,}000"),
        ("0.333...", "0.333..."),
        ("\\begin{pmatrix}1&2\\\\ 3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\ 3&4\\end{pmatrix}"),
        ("2**3", "2**3"),
        ("**5** apples", "5 apples"),
        ("5!", "5!"),
    ],
)
def test_tidy(text: str, expected: str):
    assert tidy(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("072.00", 72),
        ("1,234,567", 1234567),
        ("-5", -5),
        ("- 5", -5),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("2/4", Fraction(1, 2)),
        ("-\\frac{3}{4}", Fraction(-3, 4)),
        ("\\frac12", Fraction(1, 2)),
        ("1.5e3", 1500),
    ],
)
def test_plain_numbers_are_exact(text: str, value: Fraction | int):
    assert number(text) == Number(Fraction(value))


@pytest.mark.parametrize(
    "text", ["", "1,2", "12,34", "1/0", "x", "2+3", "1e9999", "5!", "1 2", "٣", "9" * (LONGEST + 1)]
)
def test_what_is_no_plain_number(text: str):
    assert number(text) is None


def test_percentages_equal_themselves_and_shares():
    fifty, half, plain = number("50\\%"), number("0.5"), number("50")
    assert fifty is not None
    assert half is not None
    assert plain is not None
    assert fifty == Number(Fraction(50), percent=True)
    assert fifty.equals(half)
    assert half.equals(fifty)
    assert fifty.equals(plain)
    assert not plain.equals(half)
    assert not fifty.equals(Number(Fraction(1, 2), percent=True))
