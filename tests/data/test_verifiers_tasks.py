"""Environments of the package verifiers: their tasks as rows, their episodes turn by turn."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rlpost.data.params import TASK
from rlpost.data.tasks.verifiers import Environment
from rlpost.errors import RecipeError
from rlpost.usercode import verifiers
from rlpost.usercode.binding import bind
from rlpost.usercode.calls import CallError
from rlpost.usercode.params import ENVIRONMENT, EnvironmentFunction, TimedFunction

HERE = Path(__file__).parent
GAME, SUMS = "verifiers_game.py", "verifiers_sums.py"


def rows(env: str = GAME, **args) -> list[dict]:
    return bind(TimedFunction(fn="verifiers.rows", args={"env": env, **args}), TASK, "data.x.task", HERE)()


def episodes(given: list[tuple[dict, list[str]]], env: str = GAME, args: dict | None = None) -> list[list]:
    """What episodes of the rows return to these turns, all at a time in one event loop."""

    async def one(row: dict, turns: list[str]) -> list:
        environment = Environment(env=str(HERE / env), args=args)
        try:
            found: list = [await environment.reset(row)]
            for turn in turns:
                found.append(await environment.step(turn))
            return found
        finally:
            await environment.close()

    async def main() -> list[list]:
        return await asyncio.gather(*(one(row, turns) for row, turns in given))

    return asyncio.run(main())


@pytest.mark.parametrize(("fn", "lookup"), [("rows", TASK), ("Environment", ENVIRONMENT)])
def test_the_missing_package_is_named(fn, lookup, monkeypatch):
    monkeypatch.setattr(verifiers, "PACKAGE", "no-such-package-of-rlpost")
    kind = TimedFunction if lookup is TASK else EnvironmentFunction
    with pytest.raises(RecipeError, match=r"^x\.fn: .* needs the package .*: pip install 'rlpost\["):
        bind(kind(fn=f"verifiers.{fn}", args={"env": GAME}), lookup, "x", HERE)


@pytest.mark.parametrize("version", ["0.1.14", "0.5.0", "1.0"])
def test_another_version_is_refused(version, monkeypatch):
    monkeypatch.setattr(verifiers, "version", lambda _name: version)
    message = rf"needs verifiers 0\.4, and {version} is installed: pip install 'rlpost\[verifiers\]'$"
    with pytest.raises(RecipeError, match=message):
        rows()


def test_arguments_are_checked_without_the_package(monkeypatch):
    monkeypatch.setattr(verifiers, "PACKAGE", "no-such-package-of-rlpost")
    with pytest.raises(RecipeError, match=r"has no argument 'sise' - did you mean 'size'"):
        rows(sise=3)
    with pytest.raises(RecipeError, match=r"args\.env: missing"):
        bind(TimedFunction(fn="verifiers.rows"), TASK, "x", HERE)


@pytest.mark.extras
def test_rows_are_the_tasks_with_their_chats_and_answers():
    found = rows(args={"taskset": {"highest": 2}})
    assert [row["answer"] for row in found] == ["0", "1", "2"]
    assert [row["index"] for row in found] == [0, 1, 2]
    assert len({row["key"] for row in found}) == 3
    assert found[1]["prompt"] == [{"role": "system", "content": "A digit."}, {"role": "user", "content": "Guess."}]
    assert found[1]["task"] == {"idx": 1, "prompt": "Guess.", "system_prompt": "A digit.", "answer": "1"}
    assert rows(skip=1, size=1, args={"taskset": {"highest": 2}}) == found[1:2]
    assert [row["prompt"][0]["content"] for row in rows(SUMS, skip=2, size=2)] == ["2+2=", "3+3="]


@pytest.mark.extras
@pytest.mark.parametrize(
    ("env", "args", "message"),
    [
        (SUMS, {}, "without end: give their number, `size`"),
        (GAME, {"size": 11}, "has only 10 tasks"),
        (GAME, {"size": 0}, "size at least 1"),
        (GAME, {"args": {"taskset": {"higest": 2}}}, r"args\.taskset\.higest: Extra inputs"),
        (GAME, {"args": {"player": {"turns": 2}}}, r"args\.player\.turns: Extra inputs"),
        (GAME, {"args": [1]}, "by name, got a list"),
        (GAME, {"args": {"player": {"max_total_tokens": 9}}}, r"args\.player\.max_total_tokens: .* remove it"),
        (GAME, {"args": {"id": "user-sim"}}, r"2 ask no other model \(assistant, user\)"),
        ("no_such_environment", {}, "taskset 'no_such_environment' not found"),
        ("no_such_file.py", {}, "there is no file"),
    ],
)
def test_what_is_not_played_is_one_line(env, args, message):
    with pytest.raises(CallError, match=message) as refused:
        rows(env, **args)
    assert "\n" not in str(refused.value)


@pytest.mark.extras
def test_episodes_are_played_to_their_ends_with_their_rewards():
    found = rows()
    won, cut = episodes([(found[7], ["5", "9", "7"]), (found[3], ["4", "", "nine"])])
    assert won[0] == found[7]["prompt"]
    assert won[1:3] == [([{"role": "user", "content": said}], None, False, False, {}) for said in ("higher", "lower")]
    assert won[3] == (
        None,
        1 + 0.5 / 3,
        True,
        False,
        {"rewards": {"right": 1.0, "quick": 0.5 / 3}, "metrics": {"turns": 3.0}, "ended": "user_closed"},
    )
    _, reward, terminated, truncated, info = cut[-1]
    assert (reward, terminated, truncated, info["ended"]) == (0.5 / 3, False, True, "max_turns")


@pytest.mark.extras
def test_many_episodes_beside_each_other_are_those_alone():
    found = rows()
    given = [(found[n % 10], ["2", "8", str(n % 7)]) for n in range(10) if n not in (2, 8)]
    together = episodes(given)
    assert together == [episodes([one])[0] for one in given]
    assert len({found[-1][1] for found in together}) == 2


@pytest.mark.extras
def test_a_taskset_without_an_environment_is_one_turn():
    right, wrong = episodes([(row, ["6"]) for row in rows(SUMS, skip=3, size=2)], SUMS)
    assert right == [[{"role": "user", "content": "3+3="}], (None, 2.0, True, False, right[1][4])]
    assert right[1][4] == {"rewards": {"right": 2.0}, "metrics": {}, "ended": "agent_completed"}
    assert wrong[1][1] == 0.0


@pytest.mark.extras
def test_what_the_environment_raises_is_told():
    broken = {"taskset": {"fails": True}}
    with pytest.raises(RuntimeError, match=r"^its episode failed: RuntimeError: the board is broken\n") as told:
        episodes([(rows(args=broken)[1], ["0", "1"])], args=broken)
    assert "verifiers_game.py" in told.value.__notes__[0]


@pytest.mark.extras
def test_a_row_of_another_environment_is_refused():
    row = rows()[1]
    for other in ({"prompt": "x"}, {**row, "index": 2}, {**row, "index": 99}):
        with pytest.raises(ValueError, match=r"verifiers\.rows"):
            episodes([(other, ["1"])])
