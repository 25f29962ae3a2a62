"""Answers beside references: no wrong one accepted, no right one rejected, and what is unreadable refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from math_pairs import BOXED, TEXTS, UNREADABLE_REFERENCES, Pair, R, X
from tiny_world import rlpost, save_model, save_recipe, save_rows

from rlpost.rewards.math import Verdict, verdicts
from rlpost.rewards.math_read import read
from rlpost.rewards.math_text import Unreadable
from rlpost.types import Completion

PATIENCE = 60.0
"""Seconds an answer; a slow machine must not change a verdict."""


def everything() -> Iterator[Pair]:
    for pairs in BOXED.values():
        yield from ((f"\\boxed{{{answer}}}", reference, expected) for answer, reference, expected in pairs)
    for pairs in TEXTS.values():
        yield from pairs


def judged(pairs: list[tuple[str, str]]) -> list[Verdict]:
    completions = [Completion(ids=(), action=(), text=text, finish="stop") for text, _ in pairs]
    return verdicts(completions, [{"answer": reference} for _, reference in pairs], deadline=PATIENCE)


def test_a_table_of_answers(tally):
    table = list(everything())
    found = judged([(text, reference) for text, reference, _ in table])
    wrong = []
    for (text, reference, expected), said in zip(table, found, strict=True):
        allowed = {R: (Verdict.right,), X: (Verdict.unparseable,)}.get(expected, (Verdict.wrong, Verdict.unparseable))
        if said not in allowed:
            wrong.append(f"{text!r} against {reference!r}: {said.value}, should be {expected}")
    refused = sum(expected == X for *_, expected in table)
    tally("math answers", right=len(table) - refused - len(wrong), refused=refused, wrong=len(wrong))
    assert wrong == []


def test_the_table_is_two_sided():
    expected = [verdict for *_, verdict in everything()]
    assert len(expected) >= 600
    assert 0.4 < expected.count(R) / len(expected) < 0.6


def test_every_reference_of_the_table_is_its_own_answer(tally):
    references = sorted({reference for _, reference, _ in everything()})
    found = judged([(f"\\boxed{{{reference}}}", reference) for reference in references])
    wrong = [r for r, said in zip(references, found, strict=True) if said is not Verdict.right]
    tally("math answers", right=len(references) - len(wrong), wrong=len(wrong))
    assert wrong == []


@pytest.mark.parametrize("reference", UNREADABLE_REFERENCES)
def test_references_with_two_readings_or_none(reference: str, tally):
    with pytest.raises(Unreadable):
        read(reference)
    tally("math answers", refused=1)


def recipe(here: Path, rows: str, evaluated: str | None = None) -> Path:
    stage = {
        "kind": "grpo",
        "data": {"train": {"path": rows}},
        "rewards": [{"fn": "sum", "name": "all", "of": [{"fn": "math_answer"}, {"fn": "ends"}]}],
        "steps": 1,
        "prompts_per_step": 1,
        "group_size": 2,
        "sampling": {"max_new_tokens": 2},
        "learning_rate": 1e-4,
    }
    whole = {"model": {"path": str(save_model(here / "model"))}, "stages": {"grpo": stage}}
    if evaluated:
        held_out = {
            "data": {"test": {"path": evaluated}},
            "rewards": [{"fn": "math_answer", "args": {"column": "truth"}}],
        }
        whole["evaluation"] = held_out
    return save_recipe(here / "recipe.yaml", whole)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_an_unreadable_reference_stops_before_training(here: Path, flags: list[str], tally):
    rows = [{"prompt": "a", "answer": "1/2"}, {"prompt": "b", "answer": "#### 12,345,6"}, {"prompt": "c", "answer": ""}]
    save_rows(here / "rows.jsonl", rows)
    ran = rlpost("train", recipe(here, "rows.jsonl"), *flags)
    assert ran.refused(3, "rows.jsonl:2", "'12,345,6' cannot be read", "write a space", "1 more of 3 rows"), ran
    assert not (here / "runs").exists()
    tally("references", refused=1)


def test_an_unreadable_reference_of_the_evaluation(here: Path, tally):
    save_rows(here / "rows.jsonl", [{"prompt": "a", "answer": "1"}])
    save_rows(here / "test.jsonl", [{"prompt": "a", "truth": "2"}, {"prompt": "b", "truth": "1/2x"}])
    ran = rlpost("train", recipe(here, "rows.jsonl", "test.jsonl"))
    assert ran.refused(3, "test.jsonl:2", "'1/2x' cannot be read"), ran
    tally("references", refused=1)


HOSTILE = [
    *("9^{9^{9^9}}", "9**9**9", "9**9**9**9", "9^{9^9}", "(((((9!)!)!)!)!)!", "10000!", "1000000!", "((1000!)!)!"),
    *("10^{10^{10}}", "10^{-10^{10}}", "2^{2^{2^{2^{2^2}}}}", r"\binom{10^9}{5\cdot 10^8}", r"\binom{10^{12}}{3}"),
    *(r"\frac{1}{" * 150 + "x" + "}" * 150, "(" * 490 + "1" + ")" * 490, r"\{" * 240 + "1" + r"\}" * 240),
    *("{" * 490 + "1" + "}" * 490, r"\sqrt{" * 160 + "2" + "}" * 160, "9" * 1000, "9" * 10**6, "1" + "+1" * 490),
    *("2" + "*2" * 480, "x" + "^x" * 450, "1" + "/1" * 480, "5" + "!" * 900, "-" * 900 + "5", "|" * 900, "1," * 490),
    *("1,234," * 160, "(1," * 240 + ")" * 240, "a" * 1000, "a " * 490, "a_" * 490, r"\text{" * 150 + "a" + "}" * 150),
    *("e^{e^{e^{e^e}}}", r"\sin(10^{1000})", r"\sin(9^{9^9})", r"\tan(\frac{\pi}{2})", r"\ln(0)", "0^0", "1/0"),
    *(r"\frac{0}{0}", "i^{i^i}", r"\log_1 5", r"\log_{0} 5", r"(-1)^{\pi}", r"\infty-\infty", r"\sqrt[10^9]{2}"),
    *(r"\sqrt[0]{2}", r"\sqrt[-1]{2}", "x^{x^{x^{x^x}}}", r"\sum_{n=1}^{10^{10}} n", r"\sqrt{2}+" * 110 + "1"),
    *(r"\begin{pmatrix}" + "1&" * 300 + r"1\end{pmatrix}", "1" + " " * 990, r"\boxed{" * 140, "7 " * 490),
    *("5 " + "apples " * 140, "$" * 900, "1e9999", "1e-9999+1e-9998", "3^{10000}-3^{9999}", "1:" * 490 + "1"),
    *(r"\sqrt{10^{9000}+1}-10^{4500}", r"\cosh(10^{10})", r"\exp(\exp(\exp(10)))", r"(1+10^{-5000})^{10^{5000}}"),
    *(
        r"\frac{1}{3^{5000}}+\frac{1}{7^{5000}}+\frac{1}{11^{4000}}",
        # What makes patterns with two ways to match the same go through all of them.
        *(
            "f(" + "a" * 900 + "! = 5",
            "a" + " - " * 300 + "1",
            "5" + "a" * 900 + "!",
            "5" + " a" * 450 + "!",
            "(" * 490,
        ),
        *(
            "5" + "-" * 900 + "x",
            "1" + ", " * 480 + "x",
            "5 " + "a/" * 450 + "!",
            "x_" + "{" * 490,
            "," * 4000,
            "5 ⟦" * 240,
        ),
        *(
            r"5 \boxed{1}" + " " * 10**5 + r"x\boxed{2}",
            r"\text{a}" * 140 + "!",
            r"\frac" * 190,
            "12 34 " * 160,
            "(4]{16}",
        ),
        "answer is " * 10**5,
        "\\boxed{" * 10**5,
        "#" * 10**6,
    ),
]


def test_hostile_answers_end(tally):
    """Nothing hangs and nothing is right; what is too large is said to be. The guard is the runner's patience."""
    references = (r"\sqrt{2}", "x+1", "5")
    pairs = [(f"\\boxed{{{answer}}}", reference) for answer in HOSTILE for reference in references]
    found = judged(pairs)
    right = [pair for pair, said in zip(pairs, found, strict=True) if said is Verdict.right]
    late = [pair for pair, said in zip(pairs, found, strict=True) if said is Verdict.timeout]
    tally("hostile math answers", refused=len(pairs) - len(right) - len(late), wrong=len(right) + len(late))
    assert len(HOSTILE) >= 64
    assert right == []
    assert late == []
