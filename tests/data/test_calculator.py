import random

import pytest

from rlpost.data.tasks import calculator
from rlpost.errors import RecipeError
from rlpost.types import Completion


def test_the_calculator_answers_questions_and_nothing_else():
    assert calculator.reply("47+38=") == "085;"
    assert calculator.reply("99+99") == "198;"
    assert calculator.reply("4+38=") == "???;"
    assert calculator.reply("", [""]) == "???;"
    assert calculator.reply("47+38=", ["47+38=", "085"]) is None


def test_held_out_problems_are_not_trained():
    train, held_out = calculator.train(held_out=100), calculator.held_out(n=100)
    assert len(train) == 9900
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    with pytest.raises(RecipeError, match="held_out=10000: give 0 to 9999"):
        calculator.train(held_out=10000)
    with pytest.raises(RecipeError, match="n=0: give 1 to 10000"):
        calculator.held_out(n=0)


def test_a_perfect_teacher_shows_both_turns():
    row = {"prompt": "47+38?", "answer": "085"}
    shown = [calculator.careless_teacher(row, random.Random(seed), errs=0.0) for seed in range(20)]
    assert {(r["prompt"], r["completion"]) for r in shown} == {("47+38?", "47+38="), ("47+38?47+38=085;", "085")}


def test_a_careless_teacher_gets_one_digit_wrong():
    row = {"prompt": "47+38?", "answer": "085"}
    for seed in range(20):
        shown = calculator.careless_teacher(row, random.Random(seed), errs=1.0)
        meant = "47+38=" if shown["prompt"] == "47+38?" else "085"
        assert sum(a != b for a, b in zip(shown["completion"], meant, strict=True)) == 1
    with pytest.raises(RecipeError, match="errs=2: give a probability"):
        calculator.careless_teacher(row, random.Random(0), errs=2)


def test_the_reward_asks_for_the_last_turn():
    example = {"answer": "085"}
    assert calculator.concluded(Completion((1,), (True,), "085"), example) == 1.0
    assert calculator.concluded(Completion((1,), (True,), "85"), example) == 0.0
