"""Within a user's process: one event loop for calls of coroutine functions, stopped while a plain one works."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlpost.usercode.worker import Calls, OneCall


class Loop:
    """Serves a file that has coroutine functions."""

    def __init__(self, calls: Calls, requests: int) -> None:
        """Serve `calls`, of which the descriptor `requests` is read."""
        self._calls = calls
        self._requests = requests
        self._unfinished: list[bytes] = []
        self._open = True
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[tuple[int, int], asyncio.Task[dict[str, Any]]] = {}

    def serve(self) -> None:
        """Answer requests until there are no more."""
        self._loop.add_reader(self._requests, self._read)
        while self._open or self._calls.plain:
            if self._calls.plain:
                self._loop.call_soon(self._loop.stop)  # a turn for coroutines between plain calls
            self._loop.run_forever()
            if self._calls.plain:
                self._calls.answer(self._calls.plain.popleft())

    def _read(self) -> None:
        read = os.read(self._requests, 1 << 16)
        self._open = bool(read)
        *ended, rest = read.split(b"\n")
        for end in ended:
            self._calls.take(b"".join([*self._unfinished, end, b"\n"]))
            self._unfinished.clear()
        self._unfinished.append(rest)
        while self._calls.coroutines:
            self._begin(self._calls.coroutines.popleft())
        while self._calls.cancelled:
            if task := self._tasks.get(self._calls.cancelled.popleft()):
                task.cancel()
        if self._calls.plain or not self._open:
            self._loop.stop()

    def _begin(self, call: OneCall) -> None:
        number = (call.request["number"], call.index)
        self._tasks[number] = self._loop.create_task(self._calls.answered(call))
        self._tasks[number].add_done_callback(partial(self._done, call, number))

    def _done(self, call: OneCall, number: tuple[int, int], task: asyncio.Task[dict[str, Any]]) -> None:
        del self._tasks[number]
        # One that is cancelled before it begins has no reply of its own.
        self._calls.reply(call, {"failed": "was cancelled", "trace": ""} if task.cancelled() else task.result())
