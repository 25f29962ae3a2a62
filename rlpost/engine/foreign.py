"""Users' engines: everything they return is checked before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlpost.engine.answers import fault, made_whole, shown
from rlpost.engine.api import TopTokens
from rlpost.engine.foreign_calls import Calls
from rlpost.engine.stopping import StopStrings
from rlpost.engine.top_tokens import checked, must_be_askable
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, Request
from rlpost.usercode.bound import Bound

METHODS = ("generate", "update_weights", "close")
SCORING = ("score", "close")


class ForeignEngine:
    """A user's engine. Its errors are one line that names the request."""

    def __init__(self, function: Bound, policy: Policy, deadline: float) -> None:
        """Make the engine by `function`; no call of it may take more than `deadline` seconds.

        Raises:
            EngineError: the function fails, or returns no engine.
        """
        self._policy = policy
        self._version: int | None = None
        self._calls = Calls(function, policy, METHODS, deadline)

    def update_weights(self, policy: Policy, version: int) -> None:
        """Give it new weights; see `Engine.update_weights`."""
        self._calls.call(
            lambda: self._calls.engine.update_weights(policy, version), f"update_weights to version {version}"
        )
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
        given = self._calls.call(
            lambda: self._calls.engine.generate(list(requests)), f"{what} {shown(requests[0], self._policy)}"
        )
        many = f"{len(given)} groups of completions" if isinstance(given, Sequence) else f"a {type(given).__name__}"
        if not isinstance(given, Sequence) or len(given) < len(requests):
            location = self._location(requests, len(given) if isinstance(given, Sequence) else 0)
            raise self._calls.error(
                f"returned {many} for {len(requests)} requests, none for {location}; return one for each"
            )
        if len(given) > len(requests):
            raise self._calls.error(
                f"returned {many} for {what} {shown(requests[0], self._policy)}; return one for each"
            )
        return [self._checked(requests, number, given[number]) for number in range(len(requests))]

    def close(self) -> None:
        """Close it; see `Calls.close`."""
        self._calls.close()

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
            raise self._calls.error(f"{self._location(requests, number)}: it {problem}")
        stops = StopStrings(self._policy.tokenizer, request.sampling.stop)
        return tuple(made_whole(completion, stops, self._policy, self._version) for completion in given)

    def _location(self, requests: Sequence[Request], number: int) -> str:
        return f"request {number + 1} of {len(requests)} {shown(requests[number], self._policy)}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


class ForeignScoringEngine:
    """A user's engine that scores what the policy wrote."""

    def __init__(self, function: Bound, policy: Policy, deadline: float) -> None:
        """Make the engine by `function` of `policy`, whose tokens it is to know; no call may take more than `deadline`.

        Raises:
            EngineError: the function fails, or returns no engine that scores.
        """
        self._policy = policy
        self._calls = Calls(function, policy, SCORING, deadline)

    def score(self, groups: Sequence[Group], k: int, temperature: float = 1.0) -> TopTokens:
        """See `ScoringEngine.score`.

        Raises:
            EngineError: it fails, hangs, or returns something invalid.
        """
        must_be_askable(self._policy, k, temperature)
        what = f"scoring {_count(len(groups), 'group')}"
        given = self._calls.call(lambda: self._calls.engine.score(list(groups), k, temperature), what)
        found = checked(given, groups, k, self._policy)
        if isinstance(found, str):
            raise self._calls.error(f"{what}: it gave {found}")
        return found

    def close(self) -> None:
        """Close it; see `Calls.close`."""
        self._calls.close()
