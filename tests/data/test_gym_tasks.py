"""Tasks of reasoning_gym by name, with their own verifiers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlpost.data.params import TASK
from rlpost.errors import RecipeError, RewardError
from rlpost.rewards.params import REWARD, Reward
from rlpost.types import Completion
from rlpost.usercode import gym, signatures
from rlpost.usercode.binding import bind
from rlpost.usercode.params import Function

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A package with the tasks `sums` and `mazes`, which cannot be imported: its names are read from its source."""
    folder = tmp_path / gym.GYM
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('read, not imported')\n")
    (folder / "sums.py").write_text('DATASET_NAME = "sums"\nregister_dataset(DATASET_NAME, Sums, Config)\n')
    (folder / "mazes.py").write_text('register_dataset("mazes", Mazes, Config)\n')
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, gym.GYM, raising=False)
    gym.names.cache_clear()
    signatures.named_by_package.cache_clear()
    yield
    gym.names.cache_clear()
    signatures.named_by_package.cache_clear()


def task(name: str, **args) -> list:
    return bind(Function(fn=f"reasoning_gym.{name}", args=args), TASK, "data.x.task", Path())()


def score(text: str, row: dict, **args) -> float:
    reward = bind(Reward(fn="reasoning_gym.score_answer", args=args), REWARD, "rewards[0]", Path())
    (value,) = reward([Completion([1], [True], text=text)], [row])
    return value


@pytest.mark.parametrize(("fn", "lookup"), [("sums", TASK), ("score_answer", REWARD)])
def test_the_missing_package_is_named(fn, lookup, monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda _name: None)
    kind = Reward if lookup is REWARD else Function
    with pytest.raises(RecipeError, match=r"^x\.fn: .*needs the package reasoning-gym: pip install 'rlpost\[tasks\]'$"):
        bind(kind(fn=f"reasoning_gym.{fn}"), lookup, "x", Path())


@pytest.mark.usefixtures("fake_package")
@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        ("sum", {}, r"^x\.fn: no function 'sum' in .*did you mean 'sums'\?$"),
        ("maze", {}, "did you mean 'mazes'"),
        ("sums", {"part": "test"}, r"^x\.args\.part: no choice 'test'"),
        ("sums", {"size": "many"}, r"^x\.args\.size: expected a whole number"),
    ],
)
def test_a_name_or_an_argument_that_is_wrong_is_refused_from_the_source_alone(fn, args, message):
    with pytest.raises(RecipeError, match=message):
        bind(Function(fn=f"reasoning_gym.{fn}", args=args), TASK, "x", Path())


@pytest.mark.extras
def test_every_registered_task_has_a_name():
    from reasoning_gym.factory import DATASETS

    assert set(gym.names()) == set(DATASETS)


@pytest.mark.extras
def test_no_question_is_in_both_parts_whatever_the_seeds_and_sizes():
    def questions(**args) -> set[str]:
        return {row["question"] for seed in (0, 1, 7) for row in task("chain_sum", seed=seed, **args, **SUMS)}

    assert not questions(size=1500) & questions(size=300, part="held_out")
    first = task("chain_sum", part="held_out", size=300, **SUMS)
    assert len({row["question"] for row in first}) == 300
    assert first == task("chain_sum", part="held_out", size=400, **SUMS)[:300]
    assert first != task("chain_sum", part="held_out", size=300, seed=1, **SUMS)


@pytest.mark.extras
def test_rows_are_chats_with_the_answer_and_the_verifier_knows_their_problem():
    row = task("chain_sum", size=1, system="Be brief.", instruction="Only the number.", **SUMS)[0]
    system, user = row["prompt"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": f"{row['question']}\nOnly the number."}
    assert row["completion"] == row["answer"]
    assert score(f" {row['answer']}\n", row) == 1.0
    said = f"First 3, so it is {row['answer']}."
    assert score(said, row, find="number") == 1.0
    assert 0 < score(said, row) < 1
    assert score(said, row, partial=False) == 0.0
    assert score(f"<answer>{row['answer']}</answer> or so", row, find="tag") == 1.0
    assert score("no digits", row, find="number") == score("<answer>", row, find="tag") == 0.0


@pytest.mark.extras
def test_a_verifier_that_fails_gives_nothing_and_is_told_if_it_always_does():
    (row,) = task("countdown", size=1)
    broken = {**row, "problem": {**row["problem"], "task": "no_such_task"}}
    assert score("x", broken) == 0.0
    function = bind(Reward(fn="reasoning_gym.score_answer"), REWARD, "rewards[0]", Path())
    with pytest.raises(RewardError, match="failed at all others"):
        function([Completion([1], [True], text="x")] * 2, [broken] * 2)
    with pytest.raises(RewardError, match="no 'problem'"):
        function([Completion([1], [True], text="x")], [{"prompt": "1+1="}])


@pytest.mark.extras
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"min_digit": 1}, "'chain_sum' has no option 'min_digit' - did you mean 'min_digits'"),
        ({"min_terms": 5, "max_terms": 2}, "'chain_sum' does not take"),
        ({"size": 0}, "size=0: give at least 1"),
        ({**SUMS, "max_digits": 1, "size": 1000}, "only [0-9]+ different questions in part train"),
    ],
)
def test_options_that_a_task_does_not_take_are_one_line(args, message):
    with pytest.raises(RecipeError, match=message) as refused:
        task("chain_sum", **args)
    assert "\n" not in str(refused.value)
