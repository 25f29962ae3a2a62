"""The calculator: exact, bounded, and nothing but arithmetic."""

import pytest

from rlpost.tools.calculator import calculator


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("47+38", "85"),
        ("(47 + 38) * -2", "-170"),
        ("0.1 + 0.2", "0.3"),
        ("0.1 + 0.2 - 0.3", "0"),
        ("7/2", "3.5"),
        ("1/3", "0.333333333333"),
        ("1/3*3", "1"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2^10", "1024"),
        ("2**-2", "0.25"),
        ("2**0.5", "1.41421356237"),
        ("12 × 12 ÷ 6 − 1", "23"),
        ("99999999999999999999 + 1", "100000000000000000000"),
        ("1e3", "1000"),
        ("007 + 08 - 00.5 + 1.05 + 100", "115.55"),
    ],
)
def test_results(expression, result):
    assert calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1 +", "one", "1/0", "1%0", "0**-1", "(-8)**0.5", "True", "'a'*3", "[1]", "1j", "1 < 2", "f(1)", "a.b"),
        *(
            "0x10",
            "1_0",
            "1,000",
            "e",
            "1e",
            "9**9**9**9",
            "9**9999",
            "10**61",
            "1e999",
            "1" * 501,
            "(" * 400 + "1",
            "1 if 1 else 2",
            "1; 2",
            "1\n2",
        ),
    ],
)
def test_everything_else_is_an_error_of_one_line(expression):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        calculator(expression)
