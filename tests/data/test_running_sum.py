import random

import pytest

from rlpost.data.tasks import running_sum
from rlpost.data.tasks.running_sum import RunningSum
from rlpost.errors import RecipeError

ROW = {"prompt": "4+3=", "digits": "4334120"}
RIGHT = ("2", "0", "4", "0", "2", "2")


def played(*answers: str) -> tuple[list[str | None], list[float], list[bool]]:
    episode = RunningSum()
    assert episode.reset(ROW) is None
    taken = [episode.step(answer) for answer in answers]
    assert all(not truncated and info == {} for *_, truncated, info in taken)
    return [t[0] for t in taken], [t[1] for t in taken], [t[2] for t in taken]


def test_every_turn_is_rewarded_for_the_sum_of_all_digits():
    said, rewards, ends = played(*RIGHT)
    assert said == ["+3=", "+4=", "+1=", "+2=", "+0=", None]
    assert rewards == [1 / 6] * 6
    assert sum(rewards) == pytest.approx(1)
    assert ends == [False] * 5 + [True]


def test_who_adds_to_a_wrong_answer_stays_wrong():
    # 7+5=3, 3+3=6, ...: one more than right, all the way.
    off_by_one = [str((int(answer) + 1) % 5) for answer in RIGHT]
    assert played("2", *off_by_one[1:])[1] == [1 / 6, 0, 0, 0, 0, 0]
    # It can be put right, and what is no digit is wrong.
    assert played("3", "0", "", "10", "2", "2")[1] == [0, 1 / 6, 0, 0, 1 / 6, 1 / 6]


def test_an_episode_can_begin_again():
    episode = RunningSum()
    for _ in range(2):
        episode.reset(ROW)
        assert [episode.step(answer)[1] for answer in RIGHT] == [1 / 6] * 6


def test_held_out_rows_are_not_trained():
    train, held_out = running_sum.train(held_out=100), running_sum.held_out(n=100)
    assert len(train) == 9900
    assert not {r["digits"] for r in train} & {r["digits"] for r in held_out}
    assert train[0]["prompt"] == "{}+{}=".format(*train[0]["digits"][:2])
    with pytest.raises(RecipeError, match="held_out=10000: give 0 to 9999"):
        running_sum.train(held_out=10000)
    with pytest.raises(RecipeError, match="n=0: give 1 to 10000"):
        running_sum.held_out(n=0)


def test_a_perfect_teacher_plays_as_the_environment_does():
    said, _, _ = played(*RIGHT)
    whole = "".join(f"{answer};{reply or ''}" for answer, reply in zip(RIGHT, said, strict=True))
    shown = running_sum.careless_teacher(ROW, random.Random(0), errs=0.0)
    assert shown == {**ROW, "completion": whole}


def test_a_careless_teacher_adds_to_its_own_mistakes():
    for seed in range(30):
        shown = running_sum.careless_teacher(ROW, random.Random(seed), errs=1.0)
        turns = (shown["prompt"] + shown["completion"]).split(";")
        assert len(turns) == 7
        before = turns[0][0]
        for turn in turns[:-1]:
            digit, answer = turn.split("+")[1].split("=")
            assert int(answer) != (int(before) + int(digit)) % 5
            before = answer
    with pytest.raises(RecipeError, match="errs=2: give a probability"):
        running_sum.careless_teacher(ROW, random.Random(0), errs=2)
