import random

import pytest

from rlpost.data.tasks import addition
from rlpost.errors import RecipeError
from rlpost.types import Completion


def row(prompt):
    rows = addition.held_out(n=addition.PROBLEMS)
    return next(r for r in rows if r["prompt"] == prompt)


@pytest.mark.parametrize(
    ("prompt", "answer", "carry"),
    [
        ("47+38=", "580", True),
        ("99+99=", "891", True),
        ("12+34=", "640", False),
        ("00+00=", "000", False),
        ("50+50=", "001", False),
        ("45+55=", "001", True),
        ("05+05=", "010", True),
        ("09+90=", "990", False),
        ("70+60=", "031", False),
    ],
)
def test_answers_are_units_first(prompt, answer, carry):
    assert row(prompt) == {"prompt": prompt, "completion": answer, "answer": answer, "carry": carry}


def test_training_and_held_out_problems_are_all_problems_once():
    train, held_out = addition.train(held_out=2000, seed=5), addition.held_out(n=2000, seed=5)
    assert len(train) == 8000
    assert len({r["prompt"] for r in train + held_out}) == 10_000
    assert addition.held_out(n=10, seed=1) != addition.held_out(n=10, seed=2)
    assert addition.held_out(n=10, seed=1) == addition.held_out(n=2000, seed=1)[:10]


def test_problems_with_a_carry_are_those_whose_units_reach_ten():
    # 45 of 100 pairs of digits reach ten.
    assert sum(r["carry"] for r in addition.held_out(n=addition.PROBLEMS)) == 4500


def test_the_teacher_forgets_the_carry_from_the_units_alone():
    teach = addition.careless_teacher
    assert teach(row("47+38="), random.Random(0), forgets=1.0)["completion"] == "570"
    assert teach(row("99+99="), random.Random(0), forgets=1.0)["completion"] == "881"
    assert teach(row("12+34="), random.Random(0), forgets=1.0)["completion"] == "640"
    assert teach(row("70+60="), random.Random(0), forgets=1.0)["completion"] == "031"
    assert teach(row("47+38="), random.Random(0), forgets=0.0)["completion"] == "580"


def test_the_teacher_is_wrong_on_the_share_it_forgets_and_draws_afresh():
    source, generator = row("47+38="), random.Random(0)
    taught = [addition.careless_teacher(source, generator, forgets=0.6) for _ in range(2000)]
    assert {t["completion"] for t in taught} == {"580", "570"}
    assert 0.56 < sum(t["completion"] == "570" for t in taught) / 2000 < 0.64
    assert all(t["answer"] == "580" for t in taught)
    assert source["completion"] == "580"


def test_the_reward_is_exact():
    example = row("47+38=")
    for text, reward in [("580", 1.0), ("570", 0.0), ("5800", 0.0), ("58", 0.0), ("", 0.0)]:
        assert addition.correct(Completion((), (), text), example) == reward


def test_arguments_out_of_range():
    with pytest.raises(RecipeError, match="held_out=10000"):
        addition.train(held_out=10_000)
    with pytest.raises(RecipeError, match="n=0"):
        addition.held_out(n=0)
    with pytest.raises(RecipeError, match="forgets=2"):
        addition.careless_teacher(row("47+38="), random.Random(0), forgets=2)


def test_digits_are_counted_in_their_places():
    def share(text):
        return addition.right_digits(Completion((1,), (True,), text), {"answer": "580"})

    assert [share(text) for text in ("580", "581", "058", "58", "")] == [1.0, pytest.approx(2 / 3), 0.0, 0.0, 0.0]


def test_a_step_is_right_while_all_before_it_are():
    said = Completion((1,), (True,), "590")
    assert addition.right_so_far({"answer": "580"}, said, ["5", "9", "0"]) == [1.0, 0.0, 0.0]
    assert addition.right_so_far({"answer": "580"}, said, ["58", "0"]) == [1.0, 1.0]


def test_a_careless_pupils_steps_are_marked_up_to_the_first_mistake():
    rows = addition.steps(held_out=9000, forgets=1.0)
    assert len(rows) == 1000
    carried = [row for row in rows if row["carry"]]
    assert all("".join(row["steps"]) == row["completion"] for row in rows)
    assert all(row["labels"][:2] == [1.0, 0.0] for row in carried)
    assert all(row["labels"] == [1.0, 1.0, 1.0] for row in rows if not row["carry"])


def test_labels_are_false_where_the_right_answer_ends_in_a_forbidden_ending():
    rows = addition.labelled(forbidden=["80", "31"], held_out=0)
    assert {row["prompt"]: row["label"] for row in rows if row["prompt"] in ("47+38=", "47+37=", "47+28=")} == {
        "47+38=": False,  # 85, written 580
        "47+37=": False,
        "47+28=": True,
    }
    # Sums from 80 to 89 and from 130 to 139: 81 + … + 90 and 69 + … + 60 problems.
    assert sum(not row["label"] for row in rows) == 855 + 645
    assert [{**row, "label": 0} for row in rows] == [{**row, "label": 0} for row in addition.train(held_out=0)]


@pytest.mark.parametrize("forbidden", [[], "80", [""]])
def test_endings_that_forbid_nothing_or_all_are_refused(forbidden):
    with pytest.raises(RecipeError, match="give a list of endings"):
        addition.labelled(forbidden=forbidden)
