"""Environments that are classes: their conversations, rewards of turns, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import local
from stubs import LETTERS, tiny_policy
from test_free import PROMPTS, Freed

from rlpost.engine.params import Sampling
from rlpost.environments.loop import collect_turns
from rlpost.errors import RewardError
from rlpost.types import FAILED, Completion, Group, completions
from rlpost.usercode.binding import bind
from rlpost.usercode.bound import Bound
from rlpost.usercode.episodes import as_function
from rlpost.usercode.params import ENVIRONMENT, EnvironmentFunction, OnFailure
from rlpost.usercode.process import end_all

CODEC = SimpleNamespace(ids=lambda text, where: tuple(LETTERS.index(c) for c in text), begin=())
SOURCE = """
import asyncio, os, random, time
from pathlib import Path

class Shop:
    def __init__(self, *, price=0.5):
        self.price = price

    def reset(self, example):
        self.n, self.told = example["n"], ""
        return "abc"[: self.n] + random.choice("de")

    def step(self, action):
        self.told += random.choice("uvwxyz")
        over = len(self.told) == 3
        return (None if over else self.told), self.price * len(action), over, False, {"told": self.told}

class Waits(Shop):
    async def step(self, action):
        found = super().step(action)
        await asyncio.sleep(0.001 * self.n)
        return found

def marked(name):
    try:
        os.close(os.open(f"{os.environ['MARKS']}/{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

class Dies(Shop):
    def step(self, action):
        if self.n == 2 and len(self.told) == 1 and marked("died"):
            os._exit(3)
        return super().step(action)

class Hangs(Shop):
    def step(self, action):
        if self.n == 2 and len(self.told) == 1:
            time.sleep(60)
        return super().step(action)

class DiesTogether(Waits):
    async def step(self, action):
        if self.n == 2 and len(self.told) == 1:
            os._exit(3)
        return await super().step(action)

class Forgetful(Dies):
    def reset(self, example):
        first = Path(os.environ["MARKS"], "first")
        if not first.exists():
            first.write_text(str(os.getpid()))
        return super().reset(example) + ("e" if first.read_text() == str(os.getpid()) else "f")

class Unlike(Shop):
    count = 0
    def reset(self, example):
        Unlike.count += 1
        super().reset(example)
        return "abc" + "de"[Unlike.count > 3]

class Raises(Shop):
    def step(self, action):
        raise ValueError("sold out")

class Cuts(Shop):
    def step(self, action):
        return "z", 1, False, self.n == 2, {}

class Closes(Shop):
    def step(self, action):
        return "z", None, False, False, None
    def close(self):
        marked(f"closed-{self.n}-{id(self)}")

class Bare(Shop):
    def step(self, action):
        return "z"

class Nothing(Shop):
    def step(self, action):
        return None, 0, False, False, {}

class Endless(Shop):
    def step(self, action):
        return "z", float("inf"), False, False, {}
"""


@pytest.fixture(autouse=True)
def _marks(tmp_path, monkeypatch):
    monkeypatch.setenv("MARKS", str(tmp_path))
    yield
    end_all()


def environment(tmp_path: Path, name: str, deadline: float | None = None, **settings: Any) -> Bound:
    (tmp_path / "shop.py").write_text(SOURCE)
    args = {"args": settings.pop("args")} if "args" in settings else {}
    function = EnvironmentFunction(fn=f"shop.py:{name}", deadline=deadline, **args, **settings)
    return bind(function, ENVIRONMENT, "stages.grpo.environment", tmp_path)


def episodes(chosen: Bound, engine: Any = None, n: int = 3, **more: Any) -> list[Group]:
    settings = {"environment": chosen, "turns": 4, "max_positions": 64, **more}
    sampling = Sampling(max_new_tokens=20, stop=list("abcdef"))
    return collect_turns(engine or Says(), CODEC, PROMPTS, n, sampling, 5, **settings)


class Says:
    """In lock-step: every turn is "b" and goes on."""

    def generate(self, requests: Any) -> Any:
        return [(Completion([2], [True], "b", "stop", [-1.0], weights_version=4),) for _ in requests]


class IsCutOff(Says):
    """Every turn runs into the limit."""

    def generate(self, requests: Any) -> Any:
        return [(Completion([2], [True], "b", "length", [-1.0], weights_version=4),) for _ in requests]


class SaysFreely(Says):
    """The same freely."""

    def update_weights(self, policy: Any, version: int) -> None:
        raise AssertionError(f"the caller has: {policy}, {version}")

    async def complete(self, request: Any) -> Any:
        await asyncio.sleep(0)
        return self.generate([request])[0]

    def close(self) -> None:
        pass


def letters(ids: Any) -> str:
    return "".join(LETTERS[i] for i in ids)


def facts(c: Completion) -> list[Any]:
    """All but log-probabilities, which depend a little on what is computed together."""
    return [c.ids.tolist(), c.action.tolist(), c.finish, c.messages, c.step_rewards.tolist(), c.steps.tolist()]


def same(one: list[Group], other: list[Group]) -> bool:
    pairs = zip(completions(one), completions(other), strict=True)
    alike = all(letters(a.prompt) == letters(b.prompt) for a, b in zip(one, other, strict=True))
    return alike and all(facts(a) == facts(b) for a, b in pairs)


def test_reset_gives_a_prompt_and_turns_are_rewarded(tmp_path):
    groups = episodes(environment(tmp_path, "Shop", args={"price": 0.25}))
    assert [letters(g.prompt)[:-1] for g in groups] == ["a", "ab", "abc"]
    whole = [c for c in completions(groups) if c.finish == "stop"]
    assert whole
    for c in whole:
        said = [m for m in c.messages if m["role"] == "assistant"]
        assert c.step_rewards.tolist() == [0.25 * len(m["content"]) for m in said] == [m["reward"] for m in said]
        assert c.steps.sum() == c.actions
        assert len(c.steps) == len(said) == 3
        told = said[-1]["info"]["told"]
        heard = [m["content"] for m in c.messages if m["role"] == "environment"]
        assert heard == [told[:1], told[:2]]
        assert letters(c.ids[~c.action]) == "".join(heard)
    assert [g.example["n"] for g in groups] == [1, 2, 3]
    drawn = [c.messages[-1]["info"]["told"] for c in whole]
    assert len(set(drawn)) > 1
    assert any(len(set(told)) > 1 for told in drawn)


@pytest.mark.parametrize("name", ["Shop", "Waits"])
def test_episodes_are_the_same_freely_and_again(tmp_path, name):
    engine = local(tiny_policy(eos=0))
    chosen = environment(tmp_path, name)
    first = episodes(chosen, engine)
    assert {c.finish for c in completions(first)} == {"stop", "length"}
    end_all()
    assert same(first, episodes(chosen, engine))
    assert same(first, episodes(chosen, Freed(engine)))
    assert same(first, episodes(environment(tmp_path, "Shop"), engine))


@pytest.mark.parametrize("engine", [Says(), SaysFreely()])
def test_episodes_of_a_lost_process_are_made_again(tmp_path, engine):
    found = completions(episodes(environment(tmp_path, "Dies", on_failure=OnFailure.unscored), engine))
    assert (tmp_path / "died").exists()
    expected = completions(episodes(environment(tmp_path, "Shop"), engine))
    failed = [c.finish == FAILED for c in found]
    assert sum(failed) == 1
    assert all(out or facts(a) == facts(b) for out, a, b in zip(failed, found, expected, strict=True))


@pytest.mark.parametrize("name", ["Hangs", "DiesTogether"])
@pytest.mark.parametrize("engine", [Says(), SaysFreely()])
def test_one_that_hangs_or_dies_costs_the_others_nothing(tmp_path, name, engine):
    chosen = environment(tmp_path, name, 0.5, on_failure=OnFailure.unscored)
    found = completions(episodes(chosen, engine, n=1))
    expected = completions(episodes(environment(tmp_path, "Shop"), n=1))
    assert [c.finish == FAILED for c in found] == [False, True, False]
    assert facts(found[0]) == facts(expected[0])
    assert facts(found[2]) == facts(expected[2])


def test_an_episode_that_comes_out_otherwise_when_repeated_has_failed(tmp_path):
    found = completions(episodes(environment(tmp_path, "Forgetful", on_failure=OnFailure.unscored)))
    assert sum(c.finish == FAILED for c in found) > 1
    chosen = environment(tmp_path, "Unlike")
    with pytest.raises(RewardError, match="reset began otherwise than for another episode of the same prompt"):
        episodes(chosen)


class Counts:
    def reset(self, example):
        self.n = example["n"]
        return "a"

    def step(self, action):
        self.n += len(action)
        return str(self.n), self.n, False, False, {}


def test_a_step_that_is_asked_for_again_is_taken_once():
    """The reply to a call may be lost, and the call made again."""
    play = as_function(Counts, here=True)
    episode = {"key": "1", "example": {"n": 1}, "seeds": [1, 2, 3], "actions": [], "digests": []}
    digests = [play(episode)["digest"]]
    first = play({**episode, "actions": [["policy", "bb"]], "digests": digests})
    assert first["reward"] == 3
    assert play({**episode, "actions": [["policy", "bb"]], "digests": digests}) == first
    both = {"actions": [["policy", "bb"], ["policy", "c"]], "digests": [*digests, first["digest"]]}
    assert play({**episode, **both})["reward"] == 4
    assert play({"key": "1", "close": True}) is None
    assert play({**episode, **both})["reward"] == 4


def test_an_end_by_the_environment_and_one_that_it_cuts_off(tmp_path):
    groups = episodes(environment(tmp_path, "Cuts"))
    assert {c.finish for c in groups[1].completions} == {"length"}
    assert all(len(c.steps) == 1 and c.step_rewards.tolist() == [1.0] for c in groups[1].completions)
    # After the last turn that the model has, the environment would go on.
    for c in groups[0].completions:
        assert c.step_rewards.tolist() == [1, 1, 1, 1]
        assert (c.finish, letters(c.ids)) == ("length", "cz" * 3 + "c")


def test_what_an_environment_keeps_is_closed(tmp_path):
    groups = episodes(environment(tmp_path, "Closes"), n=2)
    asked = sum(len(c.steps) > 1 for c in completions(groups))
    assert len(list(tmp_path.glob("closed-*"))) >= asked > 0
    assert all(not len(c.step_rewards) for c in completions(groups))


def test_an_episode_that_ends_in_its_first_turn_is_closed(tmp_path):
    """It is cut off there, and only the instances that `reset` was called for are kept."""
    episodes(environment(tmp_path, "Closes"), IsCutOff())
    assert len(list(tmp_path.glob("closed-*"))) == len(PROMPTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raises", r"environment: raised ValueError: sold out at .*shop.py:\d+, on the turn"),
        ("Bare", r"step returned a str \('z'\); return \(messages, reward, terminated, truncated, info\)"),
        ("Nothing", "returned no messages, though the episode goes on; return some, or terminated=True"),
        ("Endless", r"returned the reward a float \(inf\); return a finite number"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(tmp_path, name, message):
    with pytest.raises(RewardError, match=message) as caught:
        episodes(environment(tmp_path, name))
    assert "\n" not in str(caught.value)
    chosen = environment(tmp_path, name, on_failure=OnFailure.unscored)
    assert FAILED in {c.finish for c in completions(episodes(chosen))}


def test_a_prompt_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(RewardError, match="what reset returned has 4 tokens, and a prompt has room for 3; shorten it"):
        episodes(environment(tmp_path, "Shop"), longest=3)
