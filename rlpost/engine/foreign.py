"""Users' engines: everything they return is checked before it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch

from rlpost import console
from rlpost.engine.answers import fault, made_whole, shown
from rlpost.engine.stopping import StopStrings
from rlpost.errors import EngineError, RlpostError
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Request
from rlpost.usercode.bound import Bound

CLOSING = 30.0
"""Seconds that closing an engine may take."""
METHODS = ("generate", "update_weights", "close")


class ForeignEngine:
    """A user's engine. Its errors are one line that names the request."""

    def __init__(self, function: Bound, policy: Policy, deadline: float) -> None:
        """Make the engine by `function`; no call of it may take more than `deadline` seconds.

        Raises:
            EngineError: the function fails, or returns no engine.
        """
        self._name = function.name
        self._where = function.where
        self._deadline = deadline
        self._thread = _Thread()
        self._policy = policy
        self._version: int | None = None
        self._engine = self._call(lambda: function(policy), "it")
        for method in METHODS:
            if not callable(getattr(self._engine, method, None)):
                kind = type(self._engine).__name__
                raise self._error(
                    f"returned a {kind}, which has no {method}(); return an object with {', '.join(METHODS)}"
                )

    def update_weights(self, policy: Policy, version: int) -> None:
        """Give it new weights; see `Engine.update_weights`."""
        self._call(lambda: self._engine.update_weights(policy, version), f"update_weights to version {version}")
        self._policy, self._version = policy, version

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """The completions of each request; see `Engine.generate`.

        Raises:
            EngineError: it fails, hangs, or returns something invalid.
        """
        assert self._version is not None, "update_weights comes before generate"
        if not requests:
            return []
        what = f"{len(requests)} requests, the first" if len(requests) > 1 else "a request"
        given = self._call(lambda: self._engine.generate(list(requests)), f"{what} {shown(requests[0], self._policy)}")
        many = f"{len(given)} groups of completions" if isinstance(given, Sequence) else f"a {type(given).__name__}"
        if not isinstance(given, Sequence) or len(given) < len(requests):
            location = self._location(requests, len(given) if isinstance(given, Sequence) else 0)
            raise self._error(f"returned {many} for {len(requests)} requests, none for {location}; return one for each")
        if len(given) > len(requests):
            raise self._error(f"returned {many} for {what} {shown(requests[0], self._policy)}; return one for each")
        return [self._checked(requests, number, given[number]) for number in range(len(requests))]

    def close(self) -> None:
        """Close it within `CLOSING` seconds; one that hangs has been reported already."""
        if self._thread.stuck:
            return
        self._deadline = min(self._deadline, CLOSING)
        try:
            self._call(lambda: self._engine.close(), "close")
        except EngineError as error:
            console.warn(str(error))
        self._thread.end()

    def _checked(self, requests: Sequence[Request], number: int, given: Any) -> tuple[Completion, ...]:
        request = requests[number]
        problem = ""
        if not isinstance(given, Sequence):
            problem = f"gave a {type(given).__name__}; return a tuple of its {request.n} completions"
        elif len(given) != request.n:
            problem = f"gave {_count(len(given), 'completion')}, not {request.n}; return as many as its n says"
        for at, completion in enumerate(given if not problem else ()):
            if wrong := fault(completion, request, self._policy, self._version):
                problem = f"gave completion {at + 1} of {request.n} {wrong}"
                break
        if problem:
            raise self._error(f"{self._location(requests, number)}: it {problem}")
        stops = StopStrings(self._policy.tokenizer, request.sampling.stop)
        return tuple(made_whole(completion, stops, self._policy, self._version) for completion in given)

    def _location(self, requests: Sequence[Request], number: int) -> str:
        return f"request {number + 1} of {len(requests)} {shown(requests[number], self._policy)}"

    def _call(self, function: Callable[[], Any], what: str) -> Any:
        try:
            return self._thread.call(function, self._deadline)
        except TimeoutError as error:
            raise self._error(
                f"{what}: no answer within {self._deadline:g} s; mend it, or raise {self._where}.deadline"
            ) from error
        except RlpostError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            message = " ".join(str(error).split())[:200] or "(no message)"
            raise self._error(f"{what}: it raised {type(error).__name__}: {message}; mend the engine") from error

    def _error(self, what: str) -> EngineError:
        return EngineError(f"{self._where}: engine {self._name}: {what}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


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
