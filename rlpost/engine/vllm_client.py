"""HTTP to vLLM's servers: one event loop in a thread of its own, which the run's threads and coroutines share."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx2

T = TypeVar("T")
AT_ONCE = 512
"""Requests under way: each has a connection, and processes commonly may open 1024 files."""
AGAIN = (408, 429)
"""Statuses of a server that is busy."""
BACKOFF = 0.5
"""Seconds before a request is sent again; twice as long each further time, up to `LONGEST`."""
LONGEST = 10.0
HIDDEN = -9999.0
"""What a server says in place of a log-probability that is no number."""
ON = "the same command goes on from the last checkpoint"
_SHOWN = 300
"""Characters of a server's own message."""


class Unanswered(Exception):
    """No answer, or none that counts: the request may be sent again."""


class Failed(Unanswered):
    """The server failed at the request (a status from 500)."""


class Refused(Exception):
    """The server refuses the request, and would again (a status between 400 and 499)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Sends requests, as many at a time as there are; `close` ends its thread."""

    def __init__(self) -> None:
        key = os.environ.get("VLLM_API_KEY")  # which `vllm serve` reads, too
        self._http = httpx2.AsyncClient(
            timeout=None,  # requests have their own
            trust_env=False,  # servers are near, and a proxy is not meant for them
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine that sends requests returns; any thread but the loop's own may wait for it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt: nobody waits for the answers any more
            raise

    async def awaited(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a coroutine of another event loop; cancelling it cancels the requests."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def ask(
        self, method: str, url: str, deadline: float, body: dict[str, Any] | None = None, **params: str
    ) -> httpx2.Response:
        """A server's answer; for coroutines that `run` or `awaited` is given.

        Args:
            method: of HTTP.
            url: with the route.
            deadline: seconds until the answer is there as a whole, from when the request is sent.
            body: as JSON.
            params: of the URL.

        Raises:
            Unanswered: no connection, no answer in time, or the server `Failed`.
            Refused: it does not know the route, or refuses what it is sent.
        """
        try:
            async with self._slots, asyncio.timeout(deadline):
                answer = await self._http.request(method, url, json=body, params=params)
        except TimeoutError:
            raise Unanswered(f"no answer within {deadline:g} s") from None
        except httpx2.HTTPError as error:
            raise Unanswered(f"no answer ({str(error) or type(error).__name__})") from error
        if answer.status_code >= 500 or answer.status_code in AGAIN:
            raise Failed(f"it failed: {_message(answer)}")
        if answer.status_code >= 400:
            raise Refused(answer.status_code, _message(answer))
        return answer

    def close(self) -> None:
        """End requests that are under way, connections and the thread."""
        self.run(self._ended())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ended(self) -> None:
        """Whoever waits for an answer in another thread is told that it was cancelled."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()


async def persist(
    work: Callable[[int], Coroutine[Any, Any, T]], retries: int, between: Callable[[], Coroutine[Any, Any, None]]
) -> T:
    """What `work`, of the number of the attempt, returns at the first attempt that succeeds; `between` is done before
    every further one.

    Raises:
        Unanswered: what the last of them failed with.
    """
    for attempt in range(retries + 1):
        try:
            if attempt:
                await asyncio.sleep(min(BACKOFF * 2 ** (attempt - 1), LONGEST))
                await between()
            return await work(attempt)
        except Unanswered:
            if attempt == retries:
                raise
    raise AssertionError("retries are at least 0")


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all return; the first error cancels the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        raise


def _message(answer: httpx2.Response) -> str:
    """What a server says about its failure, in one line."""
    try:
        said = answer.json()
        said = said.get("error", said)
        text = str(said["message"] if isinstance(said, dict) and "message" in said else said)
    except (ValueError, AttributeError):  # not JSON, or no object
        text = answer.text
    return " ".join(text.split())[:_SHOWN] or f"status {answer.status_code}"
