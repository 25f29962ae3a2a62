"""Environments of the package verifiers: their tasks as rows, their episodes turn by turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from judge_server import Refusal, judging

from rlpost.data.params import TASK
from rlpost.data.verifiers_policy import _completion
from rlpost.errors import RecipeError
from rlpost.usercode import verifiers
from rlpost.usercode.binding import bind
from rlpost.usercode.calls import CallError, Failed
from rlpost.usercode.params import ENVIRONMENT, EPISODE, EnvironmentFunction, TimedFunction
from rlpost.usercode.process import end_all

HERE = Path(__file__).parent
GAME, SUMS = "verifiers_game.py", "verifiers_sums.py"


def rows(env: str = GAME, **args) -> list[dict]:
    return bind(TimedFunction(fn="verifiers.rows", args={"env": env, **args}), TASK, "data.x.task", HERE)()


class Player:
    """Plays episodes of the class turn by turn, all at a time, as the loop of environments calls it."""

    def __init__(self, rows: Sequence[dict], env: str = GAME, **args) -> None:
        function = EnvironmentFunction(fn="verifiers.Environment", args={"env": env, **args})
        self._remote = bind(function, ENVIRONMENT, "x", HERE).call
        self._episodes = [{"key": f"{id(self)} {n}", "example": row, "seeds": [7]} for n, row in enumerate(rows)]
        for episode in self._episodes:
            episode |= {"actions": [], "digests": []}
        self.found = self.answers(range(len(rows)))

    def answers(self, which: Sequence[int]) -> list:
        """Replies to the episodes, or what failed."""
        calls = [{EPISODE: self._episodes[n]} for n in which]
        replies = [
            reply.found for reply in self._remote.seeded(calls, [7] * len(calls), [None] * len(calls), keep_going=True)
        ]
        for n, reply in zip(which, replies, strict=True):
            if not isinstance(reply, Failed):
                self._episodes[n]["digests"].append(reply["digest"])
        return replies

    def turn(self, texts: Mapping[int, str]) -> list:
        """Replies to one turn of each of these episodes."""
        for n, text in texts.items():
            self._episodes[n]["actions"].append(["policy", text])
            self._episodes[n]["seeds"].append(11)
        return self.answers(list(texts))


@pytest.mark.parametrize(("fn", "lookup"), [("rows", TASK), ("Environment", ENVIRONMENT)])
def test_the_missing_package_is_named(fn, lookup, monkeypatch):
    monkeypatch.setattr(verifiers, "PACKAGE", "no-such-package-of-rlpost")
    kind = TimedFunction if lookup is TASK else EnvironmentFunction
    with pytest.raises(RecipeError, match=r"^x\.fn: .* needs the package .*: pip install 'rlpost\["):
        bind(kind(fn=f"verifiers.{fn}", args={"env": GAME}), lookup, "x", HERE)


@pytest.mark.parametrize("version", ["0.1.14", "0.5.0", "1.0"])
def test_another_version_is_refused(version, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _name: version)
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


def said(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.mark.extras
def test_episodes_are_played_to_their_ends_with_their_rewards():
    found = rows()
    player = Player([found[7], found[3]])
    assert [reply["messages"] for reply in player.found] == [found[7]["prompt"], found[3]["prompt"]]
    going = [player.turn({0: "5", 1: "4"}), player.turn({0: "9", 1: ""})]
    assert [[reply["messages"] for reply in replies] for replies in going] == [
        [[said("higher")], [said("lower")]],
        [[said("lower")], [said("higher")]],
    ]
    assert not any(
        reply["terminated"] or reply["truncated"] or reply["reward"] for replies in going for reply in replies
    )
    won, cut = player.turn({0: "7", 1: "nine"})
    assert (won["reward"], won["terminated"], won["truncated"]) == (1 + 0.5 / 3, True, False)
    assert won["info"] == {
        "rewards": {"right": 1.0, "quick": 0.5 / 3},
        "metrics": {"turns": 3.0},
        "ended": "user_closed",
    }
    assert (cut["reward"], cut["terminated"], cut["truncated"]) == (0.5 / 3, False, True)
    assert cut["info"]["ended"] == "max_turns"


@pytest.mark.extras
def test_episodes_that_lost_their_process_are_played_again():
    found = rows()
    player = Player([found[7], found[3]])
    player.turn({0: "5", 1: "3"})
    end_all()
    (won,) = player.turn({0: "7"})
    assert (won["reward"], won["terminated"]) == (1.25, True)


@pytest.mark.extras
def test_many_episodes_beside_each_other_are_those_alone():
    found = rows()
    given = [(found[n], [str(n // 2), str((n + 1) % 10), str(n)]) for n in (1, 3, 4, 6, 7, 9)]

    def played(some: Sequence[tuple[dict, list[str]]]) -> list[list]:
        player, replies, going = Player([row for row, _ in some]), [[] for _ in some], list(range(len(some)))
        for turn in range(3):
            for n, reply in zip(list(going), player.turn({n: some[n][1][turn] for n in going}), strict=True):
                replies[n].append(reply)
                if reply["terminated"] or reply["truncated"]:
                    going.remove(n)
        return replies

    together = played(given)
    assert together == [played([one])[0] for one in given]
    assert all(replies[-1]["info"]["rewards"]["right"] == 1.0 for replies in together)


@pytest.mark.extras
def test_a_taskset_without_an_environment_is_one_turn():
    player = Player(rows(SUMS, skip=3, size=2), SUMS)
    assert [reply["messages"] for reply in player.found] == [[said("3+3=")], [said("4+4=")]]
    right, wrong = player.turn({0: "6", 1: "6"})
    assert (right["reward"], right["terminated"]) == (2.0, True)
    assert right["info"] == {"rewards": {"right": 2.0}, "metrics": {}, "ended": "agent_completed"}
    assert (wrong["reward"], wrong["terminated"]) == (0.0, True)


@pytest.mark.extras
def test_a_file_that_is_edited_and_one_of_the_same_name_are_others(tmp_path):
    source = (HERE / GAME).read_text()
    edited = [source, source.replace("highest: int = 9", "highest: int = 4")]
    for folder, text, number in (("a", edited[0], 10), ("a", edited[1], 5), ("b", edited[0], 10)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "game.py").write_text(text)
        assert len(rows(str(tmp_path / folder / "game.py"))) == number


@pytest.mark.extras
def test_another_agent_asks_a_model_of_its_own():
    def answer(_first: str) -> Refusal:
        return Refusal(200, json.dumps(_completion("m", "What is 3+3?" if len(user.bodies) == 1 else "###DONE###")))

    with judging(answer) as user:
        agent = {"model": "m", "client": {"type": "eval", "base_url": user.url, "api_key_var": "NO_KEY_AT_ALL"}}
        args = {"id": "user-sim", "user": agent}
        player = Player(rows(SUMS, skip=3, size=1, args=args), SUMS, args=args)
        assert player.found[0]["messages"] == [said("What is 3+3?")]
        (ended,) = player.turn({0: "6"})
    assert [body["model"] for body in user.bodies] == ["m", "m"]
    assert user.bodies[1]["messages"][-1] == said("6")
    assert (ended["reward"], ended["terminated"]) == (2.0, True)


@pytest.mark.extras
def test_what_the_environment_raises_is_told():
    broken = {"taskset": {"fails": True}}
    player = Player(rows(args=broken)[1:2], args=broken)
    (failed,) = player.turn({0: "0"})
    assert failed.reason == "raised RuntimeError: its episode failed: RuntimeError: the board is broken"
    assert "verifiers_game.py" in str(failed.error)
    assert not failed.gone


@pytest.mark.extras
def test_a_row_of_another_environment_is_refused():
    row = rows()[1]
    for failed in Player([{"prompt": "x"}, {**row, "index": 2}, {**row, "index": 99}]).found:
        assert "`verifiers.rows`" in failed.reason
