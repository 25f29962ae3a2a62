import random

import pytest

from rlpost.data.tasks import programs
from rlpost.errors import RecipeError
from rlpost.rewards.code import code
from rlpost.types import Completion


def passes(rows, texts):
    """Whether each text passes all tests of its row."""
    return code([Completion((), (), text) for text in texts], rows, partial=False)


def test_right_programs_pass_and_careless_ones_do_not():
    chosen = random.Random(0).sample(programs.train(), 12)
    assert {kind for row in chosen for kind in programs.KINDS if row[kind]} == set(programs.KINDS)
    assert passes(chosen, [row["right"] for row in chosen]) == [1.0] * 12
    assert passes(chosen, [row["careless"] for row in chosen]) == [0.0] * 12


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_right_program_passes_and_no_careless_one_does():
    """A minute."""
    rows = programs.train(held_out=0)
    for column, verdict in (("right", 1.0), ("careless", 0.0)):
        assert set(passes(rows, [row[column] for row in rows])) == {verdict}


def test_each_kind_in_words_and_as_a_program():
    rows = {row["prompt"].rstrip("\n"): row for row in programs.train(held_out=0)}
    shown = {
        "f(a,b): a plus b, times 4": ("(a+b)*4", "a+b*4"),
        "f(a,b): 7 minus b, over a": ("(7-b)//a", "7-b//a"),
        "f(a,b): sum of 3 to b": ("sum(range(3,b+1))", "sum(range(3,b))"),
        "f(a,b): sum of squares, b to a": (
            "sum(i*i for i in range(b,a+1))",
            "sum(i*i for i in range(b,a))",
        ),
        "f(a,b): sum of multiples of 7, a to b": (
            "sum(i for i in range(a,b+1) if i%7==0)",
            "sum(i for i in range(a,b) if i%7==0)",
        ),
        "f(a,b): b if a is at least 5, else 0": ("b if a>=5 else 0", "b if a>5 else 0"),
        "f(a,b): a if b is at most a, else 1": ("a if b<=a else 1", "a if b<a else 1"),
        "f(s): letters 2 to 6 of s backwards": ("s[1:6][::-1]", "s[2:6][::-1]"),
    }
    for words, (right, careless) in shown.items():
        head = f"def {words.partition(':')[0]}: return "
        assert (rows[words]["right"], rows[words]["careless"]) == (head + right, head + careless)


def test_the_tests_of_a_row_differ():
    assert all(len(set(row["tests"])) == programs.TESTS for row in programs.train(held_out=0))


def test_held_out_problems_are_not_trained():
    train, held_out = programs.train(), programs.held_out()
    every = programs.train(held_out=0)
    assert (len(train), len(held_out)) == (len(every) - 300, 300)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    # A problem's tests do not depend on what is held out.
    assert {r["prompt"]: r for r in every} == {r["prompt"]: r for r in [*train, *held_out]}
    assert programs.held_out(seed=1) != held_out
    with pytest.raises(RecipeError, match="held_out=784: give 0 to 783, there are 784"):
        programs.train(held_out=784)
    with pytest.raises(RecipeError, match="n=0: give 1 to 784"):
        programs.held_out(n=0)


def test_a_careless_teacher_is_right_some_of_the_time():
    row = programs.train()[0]
    shown = [programs.careless_teacher(row, random.Random(seed))["completion"] for seed in range(200)]
    assert 0.7 < shown.count(row["careless"]) / 200 < 0.9
    assert set(shown) == {row["careless"], row["right"]}
    assert programs.careless_teacher(row, random.Random(0), errs=0)["completion"] == row["right"]
    with pytest.raises(RecipeError, match="errs=2: give a probability"):
        programs.careless_teacher(row, random.Random(0), errs=2)
