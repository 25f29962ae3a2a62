"""Users' functions that raise, end their process, hang, eat memory, or return what they should not."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_world import Ran, rlpost, save_model, save_recipe, save_rows

from rlpost.errors import RewardError
from rlpost.rewards.params import REWARD, Reward
from rlpost.rewards.score import Scorer
from rlpost.rewards.tree import BoundReward
from rlpost.types import Completion, Group
from rlpost.usercode import calls
from rlpost.usercode.binding import bind
from rlpost.usercode.params import OnFailure
from rlpost.usercode.process import end_all

STUCK = "__import__('re').match('(a+)+b', 'a' * 60)"  # within C, which holds the interpreter's lock
EATER = "[bytes(1 << 28) for _ in range(1 << 20)]"  # memory of zeros that is never written to costs nothing
FAULTS = {
    "raises": ("1 / 0", "raised ZeroDivisionError: division by zero at {file}:"),
    "exits": ("raise SystemExit(0)", "raised SystemExit: 0 at {file}:"),
    "ends its process": ("__import__('os')._exit(0)", "ended its process (exit code 0)"),
    "crashes": ("__import__('os').kill(__import__('os').getpid(), 11)", "ended its process (SIGSEGV)"),
    "sleeps": ("__import__('time').sleep(600)", "ran for over 1 s"),
    "hangs in C": (STUCK, "ran for over 1 s"),
    "eats memory": (EATER, "raised MemoryError"),
}


@pytest.fixture(autouse=True)
def _no_process_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def train(here: Path, model: Path, source: str, data: dict[str, Any] | None = None, **stage: Any) -> Ran:
    """One step of GRPO with functions of `source`."""
    save_rows(here / "d.jsonl", [{"prompt": "hi"}, {"prompt": "yo"}])
    (here / "my.py").write_text(source)
    made = {
        "kind": "grpo",
        "data": {"c": {"path": "d.jsonl", **(data or {})}},
        "steps": 1,
        "prompts_per_step": 2,
        "group_size": 2,
        "learning_rate": 1e-3,
        "table_every": 0,
        "sampling": {"max_new_tokens": 3},
        "rewards": [{"fn": "length", "args": {"target": 2}}],
        **stage,
    }
    recipe = {"model": {"path": str(model), "precision": "float32"}, "stages": {"g": made}}
    return rlpost("train", save_recipe(here / "r.yaml", recipe))


def scorer(here: Path, source: str, name: str = "f", on_failure: OnFailure | None = None, **given: Any) -> Scorer:
    (here / "my.py").write_text(source)
    reward = Reward(fn=f"my.py:{name}", deadline=given.pop("deadline", 1.0), on_failure=on_failure, **given)
    bound = bind(reward, REWARD, "rewards[0]", here)
    return Scorer([BoundReward("mine", 1.0, bound.call, unscored=on_failure is OnFailure.unscored)])


def groups(*texts: str, **example: Any) -> list[Group]:
    return [Group((1,), tuple(Completion((3,), (True,), text, "stop") for text in texts), example)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_that_fails_stops_the_run_or_leaves_its_completion_unscored(here: Path, fault, tally):
    what, told = FAULTS[fault]
    source = f"def f(completion):\n    if completion.text == 'bad':\n        {what}\n    return len(completion.text)\n"
    with pytest.raises(RewardError) as caught:
        scorer(here, source).score(groups("good", "bad", "better"))
    assert f"rewards: mine {told.format(file=here / 'my.py')}" in str(caught.value)
    assert "'bad'" in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = scorer(here, source, on_failure=OnFailure.unscored).score(groups("good", "bad", "better"))
    assert kept.total == [[4.0, None, 6.0]]
    tally("users' rewards", refused=1, right=1)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("float('nan')", "returned nan"),
        ("float('-inf')", "returned -inf"),
        ("1e30", "returned 1e+30"),
        ("'1.0'", "returned a str ('1.0')"),
        ("__import__('numpy').ones(3)", "returned a ndarray"),
        ("type('Tensor', (), {'__float__': lambda self: 1.0})()", "returned a Tensor"),
        ("[1.0]", "returned a list"),
        ("f", "returned a function"),
    ],
)
def test_what_is_no_number_is_told_in_a_line_or_unscored(here: Path, value, told, tally):
    source = f"def f(completion):\n    return {value} if completion.text == 'bad' else True\n"
    with pytest.raises(RewardError, match="rewards: mine returned") as caught:
        scorer(here, source).score(groups("good", "bad"))
    assert told in str(caught.value)
    assert scorer(here, source, on_failure=OnFailure.unscored).score(groups("bad", "good")).total == [[None, 1.0]]
    tally("users' rewards", refused=1, right=1)


@pytest.mark.parametrize(
    ("value", "told"),
    [("[1.0]", "returned 1 values for 2 completions"), ("1.0", "returned a float"), (STUCK, "ran for over 1 s")],
)
def test_a_batch_fails_as_a_whole(here: Path, value, told, tally):
    source = f"def f(completions, examples):\n    return {value}\n"
    with pytest.raises(RewardError) as caught:
        scorer(here, source).score(groups("a", "b"))
    assert f"rewards: mine {told}" in str(caught.value)
    assert scorer(here, source, on_failure=OnFailure.unscored).score(groups("a", "b")).total == [[None, None]]
    tally("users' rewards", refused=1, right=1)


def test_numbers_of_any_real_type_and_none_come_through(here: Path, tally):
    source = """
import fractions, numpy
def f(completion):
    return {"a": 1, "b": True, "c": fractions.Fraction(1, 4), "d": numpy.float32(0.5), "e": None}[completion.text]
"""
    assert scorer(here, source).score(groups(*"abcde")).total == [[1.0, 1.0, 0.25, 0.5, None]]
    tally("users' rewards", right=5)


def test_a_reward_changes_nothing_but_its_own_copy(here: Path, tally):
    source = """
def nested(completion, example):
    example["kept"].append(1)
    return len(example["kept"])
def row(completion, example):
    example["kept"] = 1
def text(completion):
    completion.text = "other"
"""
    asked = groups("a", "b", kept=[])
    assert scorer(here, source, "nested").score(asked).total == [[1.0, 1.0]]
    assert asked[0].example == {"kept": []}
    for name, told in (("row", "raised TypeError"), ("text", "raised FrozenInstanceError")):
        with pytest.raises(RewardError, match=told):
            scorer(here, source, name).score(asked)
    tally("users' rewards", right=1, refused=2)


def test_a_call_draws_the_same_random_numbers_whenever_it_is_asked(here: Path, tally):
    source = "import random, numpy\ndef f(completion):\n    return random.random() + 2 * numpy.random.rand()\n"
    (first,) = scorer(here, source).score(groups("a", "a", "b")).total
    end_all()
    (again,) = scorer(here, source).score(groups("a", "a", "b")).total
    assert first == again
    assert len(set(first)) == 3
    tally("users' rewards", right=1)


def test_a_function_that_loses_its_process_again_and_again_is_not_tried_for_ever(here: Path, tally):
    source = "import os\ndef f(completion):\n    os._exit(7)\n"
    assert scorer(here, source, on_failure=OnFailure.unscored).score(groups(*"a" * 200)).unscored == 200
    tally("users' rewards", right=1)


@pytest.mark.parametrize("fault", ["exits", "ends its process", "sleeps"])
@pytest.mark.parametrize("place", ["map", "augment", "task", "environment", "reward"])
def test_whatever_the_users_code_does_the_run_ends_in_a_line(here: Path, model: Path, place, fault, tally):
    what, told = FAULTS[fault]
    takes = {"map": "row", "augment": "row, random", "task": "", "environment": "text", "reward": "completion"}[place]
    function = {"fn": "my.py:f", "deadline": 1}
    data = {place: function} if place in ("map", "augment") else {}
    if place == "task":
        data = {"path": None, "task": function}
    stage: dict[str, Any] = {"rewards": [function]} if place == "reward" else {}
    if place == "environment":
        stage = {"environment": function, "sampling": {"max_new_tokens": 8, "stop": [chr(i) for i in range(1, 256)]}}
    done = train(here, model, f"def f({takes}):\n    {what}\n", data, **stage)
    assert done.refused(6 if place in ("environment", "reward") else 3, told.format(file=here / "my.py")), done.err
    tally("users' functions", refused=1)


@pytest.mark.parametrize("fault", ["raises", "exits", "ends its process", "sleeps", "hangs in C"])
@pytest.mark.parametrize("place", ["reward", "advantage"])
def test_a_file_that_does_not_load_is_refused(here: Path, model: Path, place, fault, tally, monkeypatch):
    monkeypatch.setattr(calls, "LOADING", 1.0)
    what, told = FAULTS[fault]
    source = f"{what}\ndef f(completion): return 1.0\ndef g(reward_PG): return reward_PG\n"
    stage = {"rewards": [{"fn": "my.py:f"}], **({"advantage": {"fn": "my.py:g"}} if place == "advantage" else {})}
    done = train(here, model, source, **stage)
    assert done.refused(2, str(here / "my.py"), told.removeprefix("raised ").split(" at ")[0]), done.err
    tally("users' functions", refused=1)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero at {file}:2"),
        ("raise SystemExit(0)", "raised SystemExit: 0 at {file}:2"),
        ("return None", "returned None"),
        ("return 1.0", "returned a float"),
        ("return logp_N.mean()", "returned a tensor of shape ()"),
        ("return -logp_N[1:]", "numbers for"),
        ("return -logp_N.detach()", "returned a tensor without a gradient"),
    ],
)
def test_a_loss_that_fails_is_told_in_a_line(here: Path, model: Path, body, told, tally):
    source = f"def f(logp_N, old_logp_N, advantage_N, rows):\n    {body}\n"
    done = train(here, model, source, loss={"fn": "my.py:f"}, sampling={"max_new_tokens": 3})
    assert done.refused(6, "stages.g.loss: f", told.format(file=here / "my.py")), done.err
    tally("users' functions", refused=1)


@pytest.mark.parametrize(
    ("body", "told"),
    [("1 / 0", "raised ZeroDivisionError: division by zero at {file}:2"), ("return 0.0", "returned a float")],
)
def test_an_advantage_that_fails_is_told_in_a_line(here: Path, model: Path, body, told, tally):
    done = train(here, model, f"def f(reward_PG):\n    {body}\n", advantage={"fn": "my.py:f"})
    assert done.refused(6, "stages.g.advantage: f", told.format(file=here / "my.py")), done.err
    tally("users' functions", refused=1)


STATEFUL = """
import os
seen = 0
def reply(text, example):
    global seen
    seen += 1
    if seen == 6:
        os._exit(0)
    return "?"
"""


def test_episodes_of_an_environment_that_ended_its_process_are_unscored(here: Path, model: Path, tally):
    stage = {
        "environment": {"fn": "my.py:reply", "on_failure": "unscored"},
        "max_turns": 3,
        "sampling": {"max_new_tokens": 24, "stop": [chr(i) for i in range(32, 127)]},
        "group_size": 4,
        "table_every": 1,
    }
    assert train(here, model, STATEFUL, **stage).code == 0
    rows = (here / "runs/r/g/rollouts/step-000001.jsonl").read_text().splitlines()
    sampled = [c for row in rows for c in json.loads(row)["completions"]]
    failed = [c for c in sampled if c["finish"] == "failed"]
    assert len(failed) > 0
    assert all((c["reward"] is None) == (c in failed) for c in sampled)
    tally("users' functions", right=1)


ASYNC = """
import asyncio
replied = asyncio.Barrier(4)
async def reply(text, turns):
    await replied.wait()  # all four episodes of a turn are replied to together
    return "?" if len(turns) < 3 else None
async def f(completion):
    await replied.wait()
    return len(completion.text)
"""


def test_an_environment_and_a_reward_may_be_async(here: Path, model: Path, tally):
    every = [chr(i) for i in range(1, 256)]
    stage = {"environment": {"fn": "my.py:reply"}, "max_turns": 3, "sampling": {"max_new_tokens": 24, "stop": every}}
    done = train(here, model, ASYNC, **stage, table_every=1, rewards=[{"fn": "my.py:f", "deadline": 30}])
    assert done.code == 0, done.err
    rows = (here / "runs/r/g/rollouts/step-000001.jsonl").read_text().splitlines()
    assert {c["finish"] for row in rows for c in json.loads(row)["completions"]} == {"stop"}
    tally("users' functions", right=1)


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ({"fn": "length", "args": {"target": 2}, "deadline": 5}, "rewards[0].deadline: is for functions of a file"),
        ({"fn": "length", "args": {"target": 2}, "on_failure": "unscored"}, "rewards[0].on_failure: is for functions"),
        ({"fn": "my.py:f", "deadline": 0}, "rewards[0].deadline"),
        ({"fn": "my.py:f", "on_failure": "ignore"}, "rewards[0].on_failure: expected one of stop, unscored"),
        ({"fn": "sum", "deadline": 5, "of": [{"fn": "my.py:f"}]}, "rewards[0].deadline"),
        ({"fn": "my.py:g", "model": "m", "deadline": 5}, "rewards[0].deadline: 'g' asks a model"),
    ],
)
def test_a_deadline_is_refused_where_nothing_would_keep_it(here: Path, model: Path, reward, told, tally):
    source = "def f(completion): return 1.0\ndef g(groups, model): return [1.0] * 4\n"
    if reward.get("model"):
        reward = {**reward, "model": str(model)}
    done = train(here, model, source, rewards=[reward])
    assert done.refused(2, told), done.err
    tally("users' functions", refused=1)


def test_rows_of_parquet_come_to_a_reward_as_they_are(here: Path, model: Path, tally):
    when = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    row = {"prompt": "hi", "when": when, "raw": b"\x00", "price": Decimal("1.10"), "nested": [{"a": [1, None]}]}
    parquet.write_table(pa.Table.from_pylist([row, row]), here / "d.parquet")
    source = """
import datetime, decimal
def f(completion, example):
    assert example["when"] == datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc), example
    assert example["raw"] == b"\\x00" and example["price"] == decimal.Decimal("1.10"), example
    assert example["nested"] == [{"a": [1, None]}], example
    return len(completion.text)
def g(row):
    return {**row, "more": (row["when"], row["raw"])}
"""
    done = train(here, model, source, {"path": "d.parquet", "map": {"fn": "my.py:g"}}, rewards=[{"fn": "my.py:f"}])
    assert done.code == 0, done.err
    tally("users' functions", right=1)


def test_what_cannot_leave_a_process_is_refused(here: Path, model: Path, tally):
    done = train(here, model, "def g(row):\n    return {**row, 'made': [1, object()]}\n", {"map": {"fn": "my.py:g"}})
    assert done.refused(3, "stages.g.data.c.map", "returned a object at made[1]"), done.err
    tally("users' functions", refused=1)
