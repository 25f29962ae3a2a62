"""The engine interface: requests in, completions out, from versioned weights; scores of given completions; and guides,
which steer sampling.

Axes: N actions, K likeliest tokens, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, Request, Tokens


class Engine(Protocol):
    """Samples completions from a policy."""

    def update_weights(self, policy: Policy, version: int) -> None:
        """Sample from the current weights of `policy` from now on, as version `version`.

        A stage counts versions; it calls this before the first request and at the start of every step. Caches of
        earlier weights end here.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """The completions of each request, in order; requests may differ in everything.

        A completion depends only on the weights, on its request's prompt, sampling, seed and limit, and on its number
        among the prompt's: not on other requests, on n, or on how many rows run at once.

        Returns:
            For each request its `n` completions: ids up to and with the token that ended it, all of them actions, their
            log-probabilities under the distribution they were drawn from, and the version of the weights.

        Raises:
            EngineError: no weights were given, a completion would not fit the model, or its logits are not numbers.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; no request follows."""
        ...


@runtime_checkable
class FreeEngine(Engine, Protocol):
    """An engine that takes further requests while it works on others, so that episodes do not wait for each other."""

    async def complete(self, request: Request) -> tuple[Completion, ...]:
        """What `generate` gives for one request; coroutines of one event loop may wait for many at a time.

        Raises:
            EngineError: as `generate`.
        """
        ...


@runtime_checkable
class SideEngine(Engine, Protocol):
    """An engine that samples beside training: the weights change while it works with those that it was given."""

    def stage(self, policy: Policy, version: int) -> Callable[[], None]:
        """Copy the weights that `policy` has now; returns what makes the engine sample from them.

        The thread that trains calls this. What it returns is called in the thread that samples, between requests, in
        the order of versions.
        """
        ...


@dataclass(frozen=True, eq=False)
class TopTokens:
    """What a model says of the actions of some groups, in order, where each was taken; on the CPU."""

    ids_NK: Tensor
    """[N, K] its likeliest tokens there, int64, in falling order."""
    logp_NK: Tensor
    """[N, K] their log-probabilities, float32."""
    logp_N: Tensor
    """[N] that of the action itself, float32."""


@runtime_checkable
class ScoringEngine(Protocol):
    """Says what a model thinks of completions that another one wrote: a teacher's engine."""

    def score(self, groups: Sequence[Group], k: int, temperature: float = 1.0) -> TopTokens:
        """The `k` likeliest tokens where each action was taken, and the log-probabilities of them and of the action.

        Args:
            groups: the N actions are theirs, in order; what is no action is read and not scored.
            k: K; 0 for the actions' own log-probabilities alone.
            temperature: logits are divided by it.

        Raises:
            EngineError: it has no such answer: the rows are too long, its vocabulary is too small, or it fails.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; nothing more is to be scored."""
        ...


class Steering(Protocol):
    """Steers the rows of one call: gives weights before each token, and is told every token."""

    def weigh(self, logits_BV: Tensor, going_B: Tensor) -> Tensor:
        """[B, V] what to add to the rows' log-probabilities before a token is drawn; −inf leaves a token out.

        Args:
            logits_BV: of the next token, cut to the tokens there are.
            going_B: False for rows that have ended and are still in the batch; their weights are 0.

        Raises:
            EngineError: a row that goes on has no token left.
        """
        ...

    def append(self, ids_B: Tensor) -> None:
        """Take note of the token that each row was given."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        ...


class Guide(Protocol):
    """Steers completions; it needs every token's logits, which only the local engine gives."""

    def begin(self, prompts: Sequence[Tokens], prompt_of_row: Sequence[int], limits: Sequence[int]) -> Steering:
        """The steering of rows that are about to continue their prompts.

        Args:
            prompts: token ids.
            prompt_of_row: [B] the prompt each row continues, ascending, none left out.
            limits: [B] the most tokens that each row is given.
        """
        ...
