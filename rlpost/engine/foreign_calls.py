"""Calls of a user's engine: in a thread of its own, each within a deadline, their failures told in one line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch

from rlpost import console
from rlpost.errors import EngineError, RlpostError
from rlpost.policy.policy import Policy
from rlpost.usercode.bound import Bound

CLOSING = 30.0
"""Seconds that closing an engine may take."""


class Calls:
    """What a user's function returned, and how its methods are called."""

    def __init__(self, function: Bound, policy: Policy, methods: Sequence[str], deadline: float) -> None:
        """Make the engine by `function`; it must have `methods`, and no call may take more than `deadline` seconds.

        Raises:
            EngineError: the function fails, or returns no such engine.
        """
        self._name = function.name
        self._where = function.where
        self._deadline = deadline
        self._thread = _Thread()
        self.engine = self.call(lambda: function(policy), "it")
        for method in methods:
            if not callable(getattr(self.engine, method, None)):
                kind = type(self.engine).__name__
                raise self.error(
                    f"returned a {kind}, which has no {method}(); return an object with {', '.join(methods)}"
                )

    def call(self, function: Callable[[], Any], what: str) -> Any:
        """What `function` returns; `what` names the call.

        Raises:
            EngineError: it raised, or has not returned in time.
        """
        try:
            return self._thread.call(function, self._deadline)
        except TimeoutError as error:
            raise self.error(
                f"{what}: no answer within {self._deadline:g} s; mend it, or raise {self._where}.deadline"
            ) from error
        except RlpostError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            message = " ".join(str(error).split())[:200] or "(no message)"
            raise self.error(f"{what}: it raised {type(error).__name__}: {message}; mend the engine") from error

    def close(self) -> None:
        """Close it within `CLOSING` seconds; one that hangs has been reported already."""
        if self._thread.stuck:
            return
        self._deadline = min(self._deadline, CLOSING)
        try:
            self.call(lambda: self.engine.close(), "close")
        except EngineError as error:
            console.warn(str(error))
        self._thread.end()

    def error(self, what: str) -> EngineError:
        """An error that names the engine."""
        return EngineError(f"{self._where}: engine {self._name}: {what}")


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: BaseException | None = None


class _Thread:
    """The thread that runs all calls of an engine; if one hangs, the thread is abandoned and ends with the process."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[_Answer]] | None] = SimpleQueue()
        self.stuck = False
        """A call has not returned."""
        # Threads have their own settings.
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        threading.Thread(target=self._run, args=(torch.get_num_threads(), device), daemon=True).start()

    def call(self, function: Callable[[], Any], deadline: float) -> Any:
        """What the function returns; raises what it raises, or TimeoutError."""
        if self.stuck:
            raise TimeoutError
        answers: SimpleQueue[_Answer] = SimpleQueue()
        self._calls.put((function, answers))
        try:
            answer = answers.get(timeout=deadline)
        except Empty:
            self.stuck = True
            raise TimeoutError from None
        if answer.error is not None:
            raise answer.error
        return answer.value

    def end(self) -> None:
        """End the thread after the calls so far."""
        self._calls.put(None)

    def _run(self, threads: int, device: int | None) -> None:
        torch.set_num_threads(threads)
        if device is not None:
            torch.cuda.set_device(device)
        while (call := self._calls.get()) is not None:
            function, answers = call
            try:
                answers.put(_Answer(function()))
            except BaseException as error:  # whatever it is, the caller is told
                answers.put(_Answer(error=error))
