from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlpost.errors import DataError, RecipeError, RewardError
from rlpost.rewards.score import BoundReward, RewardBatch, Scorer
from rlpost.types import Completion, Group


def group(*texts: str, **example: Any) -> Group:
    made = tuple(Completion(ids=(3,), action=(True,), text=text, finish="stop") for text in texts)
    return Group(prompt=(1,), completions=made, example=example)


def right(completion: Completion, example: dict[str, Any]) -> float:
    return float(completion.text == example["answer"])


def brief(completions: list[Completion], *, limit: int) -> list[float | None]:
    return [None if not c.text else float(len(c.text) <= limit) for c in completions]


def one(function: Callable[..., Any], weight: float = 1.0) -> Scorer:
    return Scorer([BoundReward("mine", weight, function)])


def always(value: Any) -> Callable[..., Any]:
    def reward(completion: Completion) -> Any:
        return value

    return reward


def always_all(value: Any) -> Callable[..., Any]:
    def reward(completions: list[Completion]) -> Any:
        return value

    return reward


GROUPS = [group("4", "five", answer="4"), group("7", answer="8")]


def test_every_completion_is_rewarded_beside_its_own_row():
    assert one(right).score([group("4", "8", answer="4"), group("4", "8", answer="8")]).total == [[1, 0], [0, 1]]


def test_items_and_batches_are_summed_with_their_weights():
    scorer = Scorer([BoundReward("right", 2.0, right), BoundReward("brief", 0.5, partial(brief, limit=3))])
    scores = scorer.score(GROUPS)
    assert scores.by_name == {"right": [[1.0, 0.0], [0.0]], "brief": [[1.0, 0.0], [1.0]]}
    assert scores.total == [[2.5, 0.0], [0.5]]
    assert scores.means() == {"right": pytest.approx(1 / 3), "brief": pytest.approx(2 / 3)}
    assert scores.unscored == 0


@pytest.mark.parametrize(("weight", "total", "unscored"), [(0.5, [[None, 1.5]], 1), (0.0, [[0.0, 1.0]], 0)])
def test_a_none_unscores_the_total_unless_its_weight_is_zero(weight: float, total: list[Any], unscored: int):
    rewards = [BoundReward("right", 1.0, right), BoundReward("brief", weight, partial(brief, limit=3))]
    scores = Scorer(rewards).score([group("", "4", answer="4")])
    assert scores.by_name["brief"] == [[None, 1.0]]
    assert scores.total == total
    assert scores.unscored == unscored


def test_means_leave_out_what_nothing_scored():
    scores = RewardBatch(total=[[None, None]], by_name={"a": [[None, None]], "b": [[1.0, None]]})
    assert scores.means() == {"b": 1.0}


def test_groups_may_be_empty_or_none():
    assert one(right).score([]) == RewardBatch(total=[], by_name={"mine": []})
    assert one(partial(brief, limit=1)).score([group(answer="4")]).total == [[]]


def test_arguments_are_given_by_name_in_any_order():
    def swapped(example: dict[str, Any], completion: Completion) -> bool:
        return bool(completion.text == example["answer"])

    def positional(completion: Completion, /) -> int:
        return len(completion.text)

    assert one(swapped).score(GROUPS).total == [[1.0, 0.0], [0.0]]
    assert one(positional).score(GROUPS).total == [[1.0, 4.0], [1.0]]


@pytest.mark.parametrize("value", [True, 1, 1.0, Fraction(1)])
def test_real_numbers_become_floats(value: Any):
    (total,) = one(always(value)).score([group("a")]).total[0]
    assert total == 1.0
    assert type(total) is float


class Tensor:
    """Like a tensor: a number by `float()`, and none by type."""

    def __float__(self) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "returned nan"),
        (float("inf"), "returned inf"),
        (float("-inf"), "returned -inf"),
        (1e30, "returned 1e\\+30"),
        (10**400, "returned 1000"),
        ("1.0", "returned a str \\('1.0'\\)"),
        (Tensor(), "returned a Tensor"),
        ([1.0], "returned a list"),
        (1j, "returned a complex"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: Any, message: str):
    with pytest.raises(RewardError, match=f"rewards: mine {message}.*for the completion 'abc'") as caught:
        one(always(value)).score([group("abc")])
    assert "\n" not in str(caught.value)
    with pytest.raises(RewardError, match=f"rewards: mine {message}"):
        one(always_all([value])).score([group("abc")])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "returned 1 values for 3 completions"),
        ([1.0] * 4, "returned 4 values for 3 completions"),
        (None, "returned a NoneType"),
        (1.0, "returned a float"),
        ("abc", "returned a str"),
        ({1.0, 2.0, 3.0}, "returned a set"),
    ],
)
def test_a_batch_is_a_list_with_one_value_each(value: Any, message: str):
    with pytest.raises(RewardError, match=f"rewards: mine {message}"):
        one(always_all(value)).score(GROUPS)


def test_an_exception_names_the_reward_the_line_and_the_text():
    def fails(completion: Completion) -> float:
        raise ValueError(f"no\nsense \x1b[31m in {completion.text}")

    line = fails.__code__.co_firstlineno + 1
    with pytest.raises(RewardError) as caught:
        one(fails).score([group("long " * 100 + "\n")])
    message = str(caught.value)
    assert message.startswith("rewards: mine raised ValueError: no sense [31m in long")
    assert f"test_score.py:{line}" in message
    assert "for the completion 'long long" in message
    assert message.isprintable()
    assert len(message) < 500
    assert isinstance(caught.value.__cause__, ValueError)


def test_leaving_the_program_is_an_error_too():
    def leaves(completion: Completion) -> float:
        sys.exit(0)

    with pytest.raises(RewardError, match="mine raised SystemExit: 0"):
        one(leaves).score([group("a")])


def test_our_own_errors_keep_their_class():
    def refuses(completion: Completion) -> float:
        raise DataError("no such column")

    with pytest.raises(DataError, match="no such column"):
        one(refuses).score([group("a")])


def test_rows_cannot_be_changed():
    def writes(completion: Completion, example: dict[str, Any]) -> float:
        example["answer"] = "x"
        return 1.0

    def reaches_in(completion: Completion, example: dict[str, Any]) -> float:
        example["list"].append(1)
        return float(len(example["list"]))

    def reaches_in_all(completions: list[Completion], examples: list[dict[str, Any]]) -> list[float]:
        counted = [reaches_in(c, e) for c, e in zip(completions, examples, strict=True)]
        completions.clear()
        return counted

    row = group("a", "b", list=[])
    with pytest.raises(RewardError, match="mine raised TypeError: 'mappingproxy'"):
        one(writes).score([row])
    two = Scorer([BoundReward("a", 1.0, reaches_in_all), BoundReward("b", 1.0, reaches_in)])
    assert two.score([row]).by_name == {"a": [[1.0, 1.0]], "b": [[1.0, 1.0]]}
    assert row.example == {"list": []}


def takes_text(text: str) -> float:
    return 1.0


def takes_no_completion(example: Any) -> float:
    return 1.0


def takes_no_completions(examples: Any) -> float:
    return 1.0


def mixes(completion: Any, examples: Any) -> float:
    return 1.0


@pytest.mark.parametrize("function", [takes_text, takes_no_completion, takes_no_completions, mixes])
def test_functions_that_take_something_else_are_refused(function: Callable[..., Any]):
    with pytest.raises(RecipeError, match="rewards: mine takes"):
        one(function)


def test_names_are_unique_and_there_is_at_least_one():
    with pytest.raises(RecipeError, match="two are called 'a'"):
        Scorer([BoundReward("a", 1.0, right), BoundReward("a", 1.0, right)])
    with pytest.raises(RecipeError, match="there are none"):
        Scorer([])


def test_importing_rewards_is_light():
    code = (
        "import sys, rlpost.rewards, rlpost.rewards.score, rlpost.evaluate.statistics as s;"
        "print([m for m in ('torch', 'sympy', 'math_verify', 'scipy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
