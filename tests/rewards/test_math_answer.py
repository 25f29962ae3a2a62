from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlpost.errors import DataError, RecipeError
from rlpost.rewards import math as math_rewards
from rlpost.rewards.math import References, Verdict, math_answer, reference_answer, verdict, verdicts
from rlpost.rewards.workers import Workers
from rlpost.types import Completion

GUARD = 100.0
"""Seconds after which something hangs, on however busy a machine."""
ROOT = "\\boxed{\\sqrt{8}}"
HANGS = "\\boxed{\\sqrt{7}}"
SLEEPER = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    reference, answer, seconds = json.loads(line)
    if "7" in answer:
        time.sleep(60)
    print("right" if "8" in answer else "wrong", flush=True)
"""


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers that go to sleep over a 7."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    pool = Workers(script)
    monkeypatch.setattr(math_rewards, "_workers", lambda: pool)
    yield
    pool.close()


def said(*texts: str) -> list[Completion]:
    return [Completion(ids=(), action=(), text=text, finish="stop") for text in texts]


def no_workers() -> Workers:
    raise AssertionError("what is rational was sent to a worker")


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("#### 72", "72", Verdict.right),
        ("#### $1,000.00", "1000", Verdict.right),
        ("\\boxed{\\frac{2}{4}}", "0.5", Verdict.right),
        ("#### 71", "72", Verdict.wrong),
        ("#### 0.33", "1/3", Verdict.wrong),
        ("\\boxed{x + 1}", "x+1", Verdict.right),
        ("\\boxed{2+3}", "5", Verdict.right),
        ("\\boxed{x=5}", "5", Verdict.right),
        ("\\boxed{2^10}", "1024", Verdict.right),
        ("\\boxed{25+25}", "50%", Verdict.right),
        ("#### 72 apples", "72", Verdict.right),
        ("\\boxed{1 or 2 or 3}", "3", Verdict.wrong),
        ("\\boxed{==+}", "5", Verdict.unparseable),
        ("\\boxed{6}", "==+", Verdict.error),
        ("I do not know", "72", Verdict.unparseable),
        ("#### " + "9" * 5000, "72", Verdict.unparseable),
        ("", "72", Verdict.unparseable),
    ],
)
def test_the_fast_path_needs_no_worker(monkeypatch: pytest.MonkeyPatch, text: str, reference: str, expected: Verdict):
    monkeypatch.setattr(math_rewards, "_workers", no_workers)
    assert verdict(text, reference) == expected


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("\\boxed{sin(pi/6)}", "1/2", Verdict.right),
        ("\\boxed{\\frac{\\sqrt 2}{2}}", "\\frac{1}{\\sqrt 2}", Verdict.right),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", Verdict.right),
        ("\\boxed{x+2}", "x+1", Verdict.wrong),
        ("\\boxed{\\sqrt{3}}", "\\sqrt{2}", Verdict.wrong),
        ("\\boxed{9^{9^{9^{9}}}}", "\\sqrt{2}", Verdict.wrong),
        ("\\boxed{9^{9^{9^{9}}}}", "8^{9^{9^{9}}}", Verdict.error),
        ("\\boxed{\\cosh(10^{10})}", "5", Verdict.error),
    ],
)
def test_workers_compute_the_rest(text: str, reference: str, expected: Verdict):
    assert verdict(text, reference, deadline=GUARD) == expected


def test_a_hanging_answer_costs_its_deadline_once_and_the_pool_goes_on(sleeper: None, monkeypatch: pytest.MonkeyPatch):
    assert verdict(ROOT, "2\\sqrt{2}", deadline=GUARD) == Verdict.right  # the pool is up
    texts = [ROOT, *[HANGS] * 64, "\\boxed{\\sqrt{6}}", "#### 2\\sqrt{2}"]
    late: list[str] = []
    judge = Workers.judge
    monkeypatch.setattr(Workers, "judge", lambda *given: [late.append(reply) or reply for reply in judge(*given)])
    found = verdicts(said(*texts), [{"answer": "2\\sqrt{2}"}] * 67, deadline=3.0)
    assert late.count("timeout") == 1
    assert found == [Verdict.right, *[Verdict.timeout] * 64, Verdict.wrong, Verdict.right]
    assert verdict(ROOT, "2\\sqrt{2}", deadline=GUARD) == Verdict.right


def test_undecided_answers_are_unscored_or_as_the_recipe_says(sleeper: None):
    completions, examples = said(ROOT, HANGS, "#### 6"), [{"answer": "2\\sqrt{2}"}] * 3
    assert math_answer(completions, examples, deadline=2.0) == [1.0, None, 0.0]
    assert math_answer(completions, examples, deadline=2.0, undecided=0.0) == [1.0, 0.0, 0.0]


def test_alarms_and_handlers_of_this_process_are_left_alone():
    before = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 1000.0)
    try:
        assert verdict(ROOT, "2\\sqrt{2}", deadline=GUARD) == Verdict.right
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        assert signal.getsignal(signal.SIGALRM) == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("5+5=10\n#### 10", "10"), ("thus \\boxed{x}.", "x"), (7, "7"), (" 1,5 ", "1,5")],
)
def test_reference_answer(value: object, expected: str):
    assert reference_answer({"answer": value}, "answer") == expected


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"answers": "5"}, r"no column 'answer' - did you mean 'answers'\?"),
        ({"question": "5"}, r"no column 'answer' \(it has: question\)"),
        ({"answer": None}, "'answer' is empty"),
        ({"answer": " "}, "'answer' is empty"),
        ({"answer": "#### 12,345,6"}, r"'12,345,6' cannot be read: the commas .* may group thousands or separate"),
        ({"answer": "1/2x"}, r"'1/2x' cannot be read: .* above or below the line"),
        ({"answer": "9" * 1001}, "cannot be read: it is longer than 1000 characters"),
    ],
)
def test_rows_without_a_readable_reference_are_refused(example: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        math_answer(said("#### 5"), [example])


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan"), float("inf")])
def test_deadlines_are_positive(deadline: float):
    with pytest.raises(RecipeError, match="deadline is"):
        math_answer(said("#### 5"), [{"answer": "5"}], deadline=deadline)


def test_each_item_is_sent_once(monkeypatch: pytest.MonkeyPatch):
    sent: list[tuple[str, str]] = []

    def judge(self: Workers, items: Sequence[tuple[str, str]], deadline: float) -> list[str]:
        sent.extend(items)
        return ["wrong"] * len(items)

    monkeypatch.setattr(Workers, "judge", judge)
    found = verdicts(said("#### x+1", "#### x+1", "#### \\pi", "#### 5"), [{"answer": "5"}] * 4)
    assert sent == [("5", "x+1"), ("5", "\\pi")]
    assert found == [Verdict.wrong, Verdict.wrong, Verdict.wrong, Verdict.right]


def test_references_are_checked_row_by_row():
    rows = [{"answer": "5"}, {"answer": "1 2"}, {"answer": "x"}, {"answer": "(1"}]
    found = References("answer")
    found.read(rows[::2], ["b.jsonl:1", "b.jsonl:3"])
    found.refuse()
    found.read(rows[1::2], ["b.jsonl:2", "b.jsonl:4"])
    with pytest.raises(
        DataError, match=r"b\.jsonl:2: .*'1 2' cannot be read: two numbers in a row.*and 1 more of 4 rows"
    ):
        found.refuse()
