"""Runs episodes freely: each is a coroutine of its own, and none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any

from rlpost.engine.api import FreeEngine
from rlpost.environments.episode import Episode
from rlpost.environments.responder import Responder


def run_freely(engine: FreeEngine, responder: Responder, episodes: Sequence[Episode]) -> None:
    """Take the episodes to their ends.

    Raises:
        EngineError: generation failed; the other episodes are cancelled, as with all that is raised.
        RewardError: the environment failed, and its failures stop the run.
    """
    _in_a_loop(_all([_live(engine, responder, episode) for episode in episodes]))


async def _live(engine: FreeEngine, responder: Responder, episode: Episode) -> None:
    """One episode; another one's call may lose the process that replies, and end it."""
    while not episode.finish:
        (turn,) = await engine.complete(episode.request())
        if not episode.finish:
            episode.add_turn(turn)
        if not episode.finish:
            await responder.ask_one(episode)


async def _all(lives: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; the first error cancels the others and is raised once they have ended."""
    tasks = [asyncio.ensure_future(life) for life in lives]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _in_a_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, also where a loop runs in this thread already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(main)
        return
    loop, ended = asyncio.new_event_loop(), Future[None]()
    thread = Thread(target=_run_there, args=(main, loop, ended), daemon=True)
    try:
        thread.start()
        ended.result()
    finally:
        with suppress(RuntimeError):  # it is closed: the thread has ended
            loop.call_soon_threadsafe(_cancel_all, loop)  # after Ctrl-C, which comes to this thread
        thread.join()


def _run_there(main: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop, ended: Future[None]) -> None:
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main)
    except BaseException as error:  # whatever it is, the caller is told
        ended.set_exception(error)
    else:
        ended.set_result(None)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
