"""Users' functions called at a time: coroutine functions, several threads, deadlines, and a process that is lost."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlpost.engine.params import ENGINE
from rlpost.errors import RecipeError
from rlpost.rewards.params import REWARD, Reward
from rlpost.rewards.score import Scorer
from rlpost.rewards.tree import BoundReward
from rlpost.types import Completion, Group
from rlpost.usercode import pipe, stop
from rlpost.usercode.binding import bind
from rlpost.usercode.calls import Failed, Remote, describe
from rlpost.usercode.params import Function
from rlpost.usercode.process import UserProcess, end_all
from rlpost.usercode.stop import Stop, Stopped

SOURCE = """
import asyncio, os, random, time

met, freed, seen = asyncio.Barrier(3), asyncio.Event(), []

async def meets(text):
    await met.wait()
    if text == "a":  # the last one to end
        await freed.wait()
    elif text == "c":
        freed.set()
    return text.upper()

async def draws(text):
    first = random.random()
    await asyncio.sleep(0)
    return first

async def waits(text):
    try:
        if text != "quick":
            await freed.wait()
        return text
    except asyncio.CancelledError:
        seen.append(text)
        raise

async def lingers(text):
    await freed.wait()
    await asyncio.sleep(0.1)
    return text

async def stubborn(text):
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

async def blocks(text):
    time.sleep(600)

async def exits(text):
    await asyncio.sleep(0)
    if text == "exits":
        os._exit(3)
    await freed.wait()

async def raises(text):
    await asyncio.sleep(0)
    raise KeyError(text)

def frees(seconds):
    time.sleep(seconds)
    freed.set()

def until(path):
    open(path + ".begun", "w").close()
    while not os.path.exists(path):
        time.sleep(0.01)

def what_was_seen():
    return seen

def own_loop(text):
    return asyncio.run(draws(text))

def hangs_once(text, *, marker):
    if text == "hang" and not os.path.exists(marker):
        open(marker, "w").close()
        time.sleep(600)
    return f"{text} of {os.getpid()}"

def doubles(number):
    return 2 * number

async def trebles(number):
    await asyncio.sleep(0)
    return 3 * number
"""


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture
def remote(tmp_path: Path) -> Any:
    """The functions of the file, by name; each may be given a deadline."""
    file = tmp_path / "my.py"
    file.write_text(SOURCE)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def made(name: str, deadline: float = 60.0, **args: Any) -> Remote:
        return Remote(file, digest, name, args, describe(file, digest, 60.0)[name], deadline)

    return made


def texts(*given: str) -> list[dict[str, str]]:
    return [{"text": text} for text in given]


async def once(function: Remote, life: int | None = None, **arguments: Any) -> Any:
    reply = await function.once(arguments, 0, life)
    assert reply is not None
    return reply.found


def test_calls_of_a_coroutine_function_are_under_way_together_and_come_back_in_order(remote):
    assert remote("meets").each(texts("a", "b", "c")) == ["A", "B", "C"]


def test_calls_that_are_awaited_one_by_one_are_too(remote):
    async def all_three() -> list[Any]:
        return await asyncio.gather(*(once(remote("meets"), text=text) for text in "abc"))

    assert asyncio.run(all_three()) == ["A", "B", "C"]


def test_what_is_drawn_before_the_first_await_depends_on_the_call_alone(remote):
    draws = remote("draws")
    lives = [None] * 3
    whole = [r.found for r in draws.seeded(texts("a", "b", "c"), [7, 8, 2**63 + 9], lives)]
    assert len(set(whole)) == 3
    assert [r.found for r in draws.seeded(texts("z"), [8], [None])] == [whole[1]]
    assert asyncio.run(draws.once({"text": "y"}, 2**63 + 9, None)).found == whole[2]
    by_place = draws.each(texts("a", "b"), first=5)
    assert draws.each(texts("a", "b"), first=5) == by_place != draws.each(texts("a", "b"), first=6)


def test_a_coroutine_that_is_late_is_cancelled_and_the_process_goes_on(remote):
    found = remote("waits", deadline=1.0).each(texts("slow", "quick", "late"), keep_going=True)
    told = [f.reason if isinstance(f, Failed) else f for f in found]
    assert told == ["ran for over 1 s", "quick", "ran for over 1 s"]
    assert not any(isinstance(f, Failed) and f.gone for f in found)
    assert sorted(remote("what_was_seen")()) == ["late", "slow"]


def test_one_that_does_not_end_is_ended_with_its_process(remote, monkeypatch):
    monkeypatch.setattr(pipe, "GRACE", 0.2)

    async def both() -> list[Any]:
        # The one that waits has an hour, and is lost with the other.
        return await asyncio.gather(
            once(remote("stubborn", 0.2), text="a"), once(remote("waits", 3600.0), text="b"), return_exceptions=True
        )

    late, other = asyncio.run(both())
    assert (late.reason, late.gone) == ("ran for over 0.2 s", True)
    assert (other.reason, other.gone) == (
        "was lost with its process, as another call of its file ran for over 0.2 s",
        True,
    )


def test_one_that_blocks_is_ended_with_its_process(remote, monkeypatch):
    monkeypatch.setattr(pipe, "GRACE", 0.2)
    (found,) = remote("blocks", 0.2).each(texts("a"), keep_going=True)
    assert (found.reason, found.gone) == ("ran for over 0.2 s", True)
    assert remote("draws").each(texts("a")) == remote("draws").each(texts("a"))


def test_all_that_is_under_way_is_lost_with_the_process(remote):
    found = remote("exits").each(texts("waits", "exits", "waits"), keep_going=True)
    assert [(f.reason, f.gone) for f in found] == [("ended its process (exit code 3)", True)] * 3


def test_what_a_coroutine_raises_is_told_with_its_line(remote):
    first, second = remote("raises").each(texts("a", "b"), keep_going=True)
    line = SOURCE.splitlines().index("    raise KeyError(text)") + 1
    assert first.reason.startswith("raised KeyError: 'a' at ")
    assert first.reason.endswith(f"my.py:{line}")
    assert not second.gone
    assert len(remote("raises").each(texts("a", "b"))) == 1


def test_a_plain_function_is_called_between_coroutines_and_may_run_a_loop_of_its_own(remote):
    async def both() -> list[Any]:
        waiting = asyncio.ensure_future(once(remote("waits"), text="a"))
        drawn = await once(remote("own_loop"), text="b")
        assert not waiting.done()
        return [drawn, await once(remote("frees"), seconds=0), await waiting]

    drawn, _, waited = asyncio.run(both())
    assert isinstance(drawn, float)
    assert waited == "a"


def test_the_clock_of_coroutines_stands_still_while_a_plain_function_works(remote):
    async def both() -> list[Any]:
        return await asyncio.gather(once(remote("lingers", 0.6), text="a"), once(remote("frees"), seconds=0.7))

    assert asyncio.run(both()) == ["a", None]


def test_a_call_that_nobody_waits_for_is_cancelled(remote):
    async def given_up() -> list[str]:
        waiting = asyncio.ensure_future(once(remote("waits"), text="a"))
        await once(remote("what_was_seen"))  # by now it has begun
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        while not (seen := await once(remote("what_was_seen"))):
            await asyncio.sleep(0)
        return seen

    assert asyncio.run(given_up()) == ["a"]


@pytest.mark.parametrize("others", [True, False])
def test_a_plain_call_that_nobody_waits_for_ends_its_process_unless_others_need_it(remote, tmp_path, others):
    path = tmp_path / "path"

    async def given_up() -> bool:
        before = await remote("doubles").once({"number": 1}, 0, None)
        waiting = asyncio.ensure_future(once(remote("until"), path=str(path)))
        while not Path(f"{path}.begun").exists():
            await asyncio.sleep(0)
        behind = asyncio.ensure_future(remote("doubles").once({"number": 2}, 0, None))
        await asyncio.sleep(0)
        if not others:
            behind.cancel()
        waiting.cancel()
        await asyncio.wait([waiting, behind])
        path.touch()
        after = await behind if others else await remote("doubles").once({"number": 2}, 0, None)
        assert after.found == 4
        return after.life == before.life

    if others:
        threading.Timer(0.1, path.touch).start()
    assert asyncio.run(given_up()) == others


def test_a_call_for_a_process_that_is_gone_is_lost(remote):
    meets, draws = remote("meets"), remote("draws")
    (first,) = draws.seeded(texts("a"), [1], [None])
    (second,) = draws.seeded(texts("a"), [1], [first.life])
    assert (second.found, second.life) == (first.found, first.life)
    end_all()
    lost, anew = draws.seeded(texts("a", "a"), [1, 1], [first.life, None], keep_going=True)
    assert lost.found == Failed("lost its process after its last reply, and what it kept there", gone=True)
    assert lost.life == first.life
    assert anew.found == first.found
    assert anew.life != first.life
    assert asyncio.run(once(meets, first.life, text="a")) == lost.found


def test_threads_get_the_answers_to_their_own_calls(remote):
    doubles, trebles = remote("doubles"), remote("trebles")
    found: dict[int, list[Any]] = {}

    def asks(thread: int) -> None:
        numbers = range(1000 * thread, 1000 * thread + 20)
        calls = [{"number": n} for n in numbers]
        found[thread] = [(doubles.each(calls), trebles.each(calls), doubles(number=thread)) for _ in range(10)]

    threads = [threading.Thread(target=asks, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread, rounds in found.items():
        numbers = range(1000 * thread, 1000 * thread + 20)
        assert rounds == [([2 * n for n in numbers], [3 * n for n in numbers], 2 * thread)] * 10
    assert len(found) == 4


def test_calls_that_wait_behind_one_that_hangs_are_made_in_the_next_process(remote, tmp_path):
    slow, patient = (remote("hangs_once", deadline, marker=str(tmp_path / "marker")) for deadline in (1.0, 3600.0))
    before = patient(text="before")
    (started,) = slow.each(texts("first"))
    found: list[Any] = []
    hanging = threading.Thread(target=lambda: found.extend(slow.each(texts("hang", "next"), keep_going=True)))
    hanging.start()
    while not (tmp_path / "marker").exists():
        time.sleep(0.01)
    after = patient(text="after")
    hanging.join()
    assert found[0] == Failed("ran for over 1 s", gone=True)
    life = before.removeprefix("before")
    assert started == f"first{life}"
    assert after.startswith("after of ")
    assert after.removeprefix("after") == found[1].removeprefix("next") != life


@pytest.mark.parametrize("name", ["waits", "frees"])
def test_a_signal_that_asks_to_stop_ends_calls_of_both_kinds(remote, monkeypatch, name):
    monkeypatch.setattr(stop, "GRACE", 0.0)
    function = remote(name)
    arguments = {"text": "a"} if name == "waits" else {"seconds": 600}
    Stop.request()
    try:
        with pytest.raises(Stopped):
            function.each([arguments])
        with pytest.raises(Stopped):
            asyncio.run(function.once(arguments, 0, None))
    finally:
        Stop.forget()


def test_what_ended_a_process_is_told_to_all_who_ask_it(tmp_path):
    (tmp_path / "my.py").touch()
    ended = UserProcess(tmp_path / "my.py", "").pipe(60.0)
    ended.end(error=OSError("out of memory"))
    for asked in (ended.described, lambda: ended.send([], [])):
        with pytest.raises(OSError, match="out of memory"):
            asked()


def test_a_reward_may_be_async(tmp_path):
    source = "import asyncio\nmet = asyncio.Barrier(2)\nasync def f(completion):\n    await met.wait()\n"
    (tmp_path / "my.py").write_text(source + "    return len(completion.text)\n")
    bound = bind(Reward(fn="my.py:f"), REWARD, "rewards[0]", tmp_path)
    group = Group((1,), tuple(Completion((3,), (True,), text, "stop") for text in ("a", "bcd")), {})
    assert Scorer([BoundReward("mine", 1.0, bound.call)]).score([group]).total == [[1.0, 3.0]]


@pytest.mark.parametrize(
    ("source", "lookup", "where"),
    [("policy", ENGINE, "rollouts.engine"), ("groups, model", REWARD, "rewards[0].fn")],
)
def test_what_is_called_in_the_trainers_process_may_not(tmp_path, source, lookup, where):
    (tmp_path / "my.py").write_text(f"async def f({source}):\n    pass\n")
    function = Reward(fn="my.py:f", model="m") if lookup is REWARD else Function(fn="my.py:f")
    with pytest.raises(RecipeError) as caught:
        bind(function, lookup, where.partition(".")[0], tmp_path)
    assert str(caught.value) == (
        f"{where}: 'f' is `async def`, but this process calls it and waits - write it with `def`"
    )
