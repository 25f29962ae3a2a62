import pytest

from rlpost.data.tasks import gsm8k
from rlpost.errors import DataError


def solution(text, right):
    return {"is_correct": right, "solution": text}


def solved(**entries):
    return {"question": "How many legs have 3 cats?", "ground_truth": "3 * 4 = 12\nA: 12", **entries}


MIXED = solved(
    a=solution("3*4=12\nA: 12", True),
    b=solution("3+4=7\nA: 7", False),
    c=solution("12 legs\nA: 12", True),
    d=solution("3+4=7\nA: 7", False),
)
PROMPT = "Question: How many legs have 3 cats?\nAnswer:\n"


def test_a_question_becomes_prompt_completion_and_final_answer():
    row = gsm8k.question_answer({"question": "How many? ", "answer": "1,000 + 200\n#### 1,200"})
    assert row == {
        "prompt": "Question: How many?\nAnswer:\n",
        "completion": "1,000 + 200\n#### 1,200",
        "answer": "1200",
        "question": "How many? ",
    }


@pytest.mark.parametrize(
    ("text", "answer"), [("#### 5", "5"), ("a\n#### $1,250.50 ", "1250.50"), ("#### 3\n#### -4\n", "-4")]
)
def test_the_final_answer_stands_after_the_last_hashes(text, answer):
    assert gsm8k.final_answer(text) == answer


def test_every_right_solution_meets_every_distinct_wrong_one():
    assert gsm8k.solution_pairs(MIXED) == [
        {
            "prompt": PROMPT,
            "chosen": chosen,
            "rejected": "3+4=7\n#### 7",
            "question": "How many legs have 3 cats?",
        }
        for chosen in ("3*4=12\n#### 12", "12 legs\n#### 12")
    ]


def test_only_the_last_line_is_converted():
    row = solved(a=solution("A: 3 cats\nB: 4\nA: 12", True), b=solution("unfinished", False))
    (pair,) = gsm8k.solution_pairs(row)
    assert pair["chosen"] == "A: 3 cats\nB: 4\n#### 12"
    assert pair["rejected"] == "unfinished"


def test_a_question_gives_pairs_or_an_evaluation_row_but_not_both():
    all_right = solved(a=solution("A: 12", True))
    assert gsm8k.solution_pairs(all_right) == []
    assert gsm8k.only_without_pairs(MIXED) is None
    row = gsm8k.only_without_pairs(all_right)
    assert row is not None
    assert (row["prompt"], row["completion"], row["answer"]) == (PROMPT, "3 * 4 = 12\n#### 12", "12")


def test_solutions_keep_their_verdict():
    rows = gsm8k.solutions(MIXED)
    assert [(r["completion"], r["correct"]) for r in rows] == [
        ("3*4=12\n#### 12", True),
        ("12 legs\n#### 12", True),
        ("3+4=7\n#### 7", False),
    ]
    assert {r["prompt"] for r in rows} == {PROMPT}


def test_wrong_rows_are_told():
    with pytest.raises(DataError, match="no final answer"):
        gsm8k.question_answer({"question": "a", "answer": "b"})
    with pytest.raises(DataError, match="no text in column 'answer'"):
        gsm8k.question_answer({"question": "a"})
    with pytest.raises(DataError, match="example_model_solutions"):
        gsm8k.solution_pairs({"question": "a", "answer": "#### 1"})
