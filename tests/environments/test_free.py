"""Episodes that run freely: the same as in lock-step, none waits for another, and what happens when something fails."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden
import numpy as np
import pytest
from engines import local
from stubs import LETTERS, tiny_policy
from torch.multiprocessing import start_processes

from rlpost import ranks
from rlpost.engine.api import FreeEngine
from rlpost.engine.divided import DividedEngine, DividedFreeEngine, divided_engine
from rlpost.engine.params import Sampling
from rlpost.environments import replies
from rlpost.environments.loop import collect_turns
from rlpost.errors import EngineError, RewardError
from rlpost.types import FAILED, Completion, Group, Request, completions
from rlpost.usercode import pipe, stop
from rlpost.usercode.binding import bind
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import ENVIRONMENT, EnvironmentFunction, OnFailure
from rlpost.usercode.process import end_all
from rlpost.usercode.stop import Stop, Stopped

CODEC = SimpleNamespace(ids=lambda text, where: tuple(LETTERS.index(c) for c in text))
PROMPTS = [Group((1, 2, 3), (), {"n": 1}), Group((4, 5), (), {"n": 2}), Group((6,), (), {"n": 3})]
SOURCE = """
import asyncio, os, random, time

over, count = asyncio.Event(), 0

def plain(text, turns):
    return random.choice("uvwxyz") if len(turns) < 3 else None

async def coroutine(text, turns):
    drawn = random.choice("uvwxyz")
    await asyncio.sleep(0.01 * random.random())
    return drawn if len(turns) < 3 else None

async def first_waits_for_second(text, turns, example):
    if example["n"] == 1 and len(turns) == 1:
        await over.wait()
    if example["n"] == 2 and len(turns) == 3:
        over.set()
    return "z"

async def fails_for_second(text, turns, example):
    if example["n"] == 2:
        raise ValueError("no")
    return "z"

async def loses_its_process(text, turns, example):
    if example["n"] == 2 and len(turns) == 2:
        os._exit(7)
    return "z"

def loses_it_in_turn(text, turns, example):
    return asyncio.run(loses_its_process(text, turns, example))

def always_loses_it(text):
    global count
    count += 1
    os._exit(7)
"""


class Freed:
    """The local engine, asked one request at a time, in an order of its own."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.asked: list[Request] = []

    def update_weights(self, policy: Any, version: int) -> None:
        raise AssertionError(f"the caller has: {policy}, {version}")

    def generate(self, requests: Sequence[Request]) -> Any:
        raise AssertionError(f"episodes run freely: {requests}")

    async def complete(self, request: Request) -> tuple[Completion, ...]:
        self.asked.append(request)
        for _ in range(request.seed % 5):
            await asyncio.sleep(0)
        (found,) = self.own.generate([request])
        return found

    def close(self) -> None:
        pass


class Scripted(Freed):
    """Every turn is "b" and goes on, but for what is overridden."""

    def __init__(self) -> None:
        super().__init__(None)

    async def complete(self, request: Request) -> tuple[Completion, ...]:
        self.asked.append(request)
        await asyncio.sleep(0)
        return (Completion([2], [True], "b", "stop", [-1.0], weights_version=4),)


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_policy(eos=0)


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    (tmp_path / "my.py").write_text(SOURCE)

    def made(name: str, on_failure: OnFailure | None = None, deadline: float = 60.0) -> Bound:
        function = EnvironmentFunction(fn=f"my.py:{name}", on_failure=on_failure, deadline=deadline)
        return bind(function, ENVIRONMENT, "environment", tmp_path)

    return made


def episodes(engine: Any, environment: Any, n: int = 1, turns: int = 3, budget: int = 14) -> list[Completion]:
    sampling = Sampling(max_new_tokens=budget, stop=["a", "b", "c", "d", "e", "f"])
    bound = environment if isinstance(environment, Bound) else Bound(environment, "environment")
    settings = {"environment": bound, "turns": turns, "max_positions": 64}
    return completions(collect_turns(engine, CODEC, PROMPTS, n, sampling, 5, **settings))


def here(text: str, turns: list[str]) -> str | None:
    return "yz" if len(turns) < 3 else None


def same(some: Sequence[Completion], others: Sequence[Completion]) -> bool:
    """Their log-probabilities up to rounding, which depends on the rows that run beside them."""
    told = [[(c.ids.tolist(), c.action.tolist(), c.text, c.finish) for c in every] for every in (some, others)]
    logprobs = [np.concatenate([c.logprobs for c in every]) for every in (some, others)]
    return told[0] == told[1] and np.allclose(*logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "coroutine"])
def test_episodes_are_what_they_are_in_lock_step(environment, policy, name):
    free = Freed(local(policy))
    together, alone = (episodes(engine, environment(name), n=2, budget=40) for engine in (local(policy), free))
    assert same(together, alone)
    assert len({c.finish for c in alone}) == 2
    assert any(len(request.prompt) > 6 for request in free.asked)
    assert len({request.seed for request in free.asked}) == len(free.asked)
    assert max(sum(np.diff(c.action.astype(int)) > 0) for c in alone) == 2


def test_what_an_environment_draws_does_not_depend_on_episodes_beside_it(environment, policy):
    for engine in (local(policy), Freed(local(policy))):
        three, one = (episodes(engine, environment("plain"), n=n) for n in (3, 1))
        assert same(one, three[::3])


def test_an_episode_waits_for_no_other(environment):
    """The first one is replied to once the second has had its third turn: in lock-step that never comes."""
    found = episodes(Scripted(), environment("first_waits_for_second"), turns=4)
    assert [len(c.ids) for c in found] == [7, 7, 7]
    assert {(c.finish, c.weights_version) for c in found} == {("stop", 4)}

    end_all()

    class InLockStep:
        def generate(self, requests: Sequence[Request]) -> Any:
            return [(Completion([2], [True], "b", "stop", [-1.0]),)] * len(requests)

    with pytest.raises(RewardError, match="environment: ran for over 1 s, on the turn 'b'"):
        episodes(InLockStep(), environment("first_waits_for_second", deadline=1.0), turns=4)


@pytest.mark.parametrize("name", ["fails_for_second", "here"])
def test_a_failure_of_the_environment_stops_all_episodes_or_ends_its_own(environment, name):
    def broken(text, turns, example):
        if example["n"] == 2:
            raise ValueError("no")
        return "z"

    stops, goes_on = (
        (Bound(broken, "broken", unscored=lenient) for lenient in (False, True))
        if name == "here"
        else (environment(name), environment(name, OnFailure.unscored))
    )
    with pytest.raises(RewardError, match=r"^environment: raised ValueError: no.*, on the turn 'b'; mend the function"):
        episodes(Scripted(), stops)
    found = episodes(Scripted(), goes_on)
    assert [(c.finish, len(c.ids)) for c in found] == [("stop", 5), (FAILED, 1), ("stop", 5)]


@pytest.mark.parametrize("name", ["loses_its_process", "loses_it_in_turn"])
def test_episodes_that_a_lost_process_had_replied_to_are_lost_with_it(environment, name):
    with pytest.raises(RewardError, match=r"environment: (ended|was lost with|lost) its process"):
        episodes(Scripted(), environment(name))
    end_all()
    lenient = environment(name, OnFailure.unscored)
    assert [c.finish for c in episodes(Scripted(), lenient, turns=4)] == [FAILED] * 3


def test_an_environment_that_loses_its_process_again_and_again_is_not_tried_for_ever(environment, monkeypatch):
    monkeypatch.setattr(replies, "GIVE_UP", 2)
    lenient = environment("always_loses_it", OnFailure.unscored)
    started = next(pipe._lives)
    assert {c.finish for c in episodes(Scripted(), lenient, n=20)} == {FAILED}
    assert next(pipe._lives) - started <= 4


def test_an_error_of_the_engine_cancels_the_others_and_is_raised_once():
    cancelled = []

    class Breaks(Scripted):
        async def complete(self, request: Request) -> tuple[Completion, ...]:
            if len(request.prompt) == 2:
                raise EngineError("no answer")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(len(request.prompt))
                raise
            raise AssertionError

    with pytest.raises(EngineError, match=r"^no answer$"):
        episodes(Breaks(), here)
    assert sorted(cancelled) == [1, 3]


@pytest.mark.parametrize("in_a_notebook", [False, True])
def test_ctrl_c_ends_all_episodes(in_a_notebook):
    class Interrupted(Scripted):
        cancelled = 0

        async def complete(self, request: Request) -> tuple[Completion, ...]:
            self.asked.append(request)
            if len(self.asked) == 3:
                os.kill(os.getpid(), signal.SIGINT)  # as a terminal does
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            raise AssertionError

    async def notebook() -> None:
        episodes(engine, here)

    engine = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        asyncio.new_event_loop().run_until_complete(notebook()) if in_a_notebook else episodes(engine, here)
    assert engine.cancelled == 3


def test_a_signal_that_asks_to_stop_ends_all_episodes(environment, monkeypatch):
    monkeypatch.setattr(stop, "GRACE", 0.0)
    Stop.request()
    try:
        with pytest.raises(Stopped):
            episodes(Scripted(), environment("plain", OnFailure.unscored))
    finally:
        Stop.forget()


def test_a_loop_that_runs_already_is_left_alone(environment):
    async def notebook() -> list[Completion]:
        return episodes(Scripted(), environment("coroutine"))

    assert same(asyncio.run(notebook()), episodes(Scripted(), environment("coroutine")))


def test_ranks_divide_whole_episodes(environment, monkeypatch):
    whole = episodes(Scripted(), environment("plain"), n=3)
    monkeypatch.setattr(ranks, "_count", 2)
    engine = DividedFreeEngine(Scripted())
    found: list[Completion] = []
    for index in (0, 1):
        monkeypatch.setattr(ranks, "_index", index)
        parts: list[Any] = []
        monkeypatch.setattr(ranks, "together", lambda work, parts=parts: parts.append(work()) or [whole])
        assert same(episodes(engine, environment("plain"), n=3), whole)
        found += parts[0]
        assert 0 < len(parts[0]) < len(whole)
    assert same(found, whole)


def test_an_engine_of_ranks_is_free_where_theirs_are(policy):
    assert isinstance(divided_engine(Scripted()), FreeEngine)
    divided = divided_engine(local(policy))
    assert isinstance(divided, DividedEngine)
    assert not isinstance(divided, FreeEngine)


def _rank(rank: int, launcher: list[dict[str, str]], folder: str) -> None:
    """One of two ranks: in a file, its episodes, how many turns it sampled, and how a failure on one of them ended."""
    os.environ |= launcher[rank]
    ranks.start()
    bound = bind(EnvironmentFunction(fn="my.py:plain"), ENVIRONMENT, "environment", Path(folder))
    engine = Scripted()
    found = episodes(divided_engine(engine), bound, n=2)
    failing = bind(EnvironmentFunction(fn="my.py:fails_for_second"), ENVIRONMENT, "environment", Path(folder))
    with pytest.raises(RewardError) as caught:
        episodes(divided_engine(Scripted()), failing, n=1)
    told = {"ids": [c.ids.tolist() for c in found], "asked": len(engine.asked), "raised": str(caught.value)}
    Path(folder, f"told{rank}").write_text(json.dumps(told))


@pytest.mark.slow  # half a minute
def test_two_ranks_run_the_episodes_of_one(tmp_path, environment):
    alone = Scripted()
    whole = [c.ids.tolist() for c in episodes(alone, environment("plain"), n=2)]
    start_processes(_rank, (golden.ranks_of(2), str(tmp_path)), nprocs=2, start_method="forkserver")
    told = [json.loads((tmp_path / f"told{rank}").read_text()) for rank in (0, 1)]
    assert [t["ids"] for t in told] == [whole, whole]
    assert min(t["asked"] for t in told) > 0
    assert sum(t["asked"] for t in told) == len(alone.asked)
    assert told[0]["raised"] == told[1]["raised"]
    assert "raised ValueError: no" in told[0]["raised"]


def test_the_example_of_the_docs_runs_programs(tmp_path):
    page = (Path(__file__).parents[2] / "docs/environments.md").read_text("utf-8")
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "async def" in block]
    (tmp_path / "program.py").write_text(source)
    reply = bind(EnvironmentFunction(fn="program.py:reply"), ENVIRONMENT, "environment", tmp_path)
    calls = [{"text": f"print({n} + 1)", "turns": ["one"]} for n in range(3)] + [{"text": "", "turns": ["one", "two"]}]
    assert reply.call.each(calls) == [*(f"{n + 1}\n" for n in range(3)), None]
