"""vLLM's servers as a teacher: they keep their own model, are given no weights, and score what the policy wrote.

Each row is a prompt of token ids to `/v1/completions` with `prompt_logprobs`: the likeliest tokens at every place of
the row, and the row's own. vLLM takes them from the model's logits as they are, whatever the request's sampling: at
temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from rlpost.engine.api import TopTokens
from rlpost.engine.params import ScoringChoice
from rlpost.engine.top_tokens import checked, joined, must_be_askable
from rlpost.engine.vllm_client import HIDDEN, ON, Client, Refused, Unanswered, all_of, persist
from rlpost.engine.vllm_meet import Error, first_model, must_share_tokens
from rlpost.errors import EngineError
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, Ids

T = TypeVar("T")
COMPLETIONS = "/v1/completions"
_SHARED = 256
"""Tokens from all over the vocabulary whose text is compared."""
_SCORED = 8
"""Of these, tokens that are scored when a server is met."""


@dataclass(frozen=True)
class _Server:
    url: str
    model: str
    positions: int


@dataclass(frozen=True)
class _Row:
    """A completion with its prompt, as far as its last action."""

    ids: Ids
    action: Ids
    """Where its actions are."""


class VllmTeacher:
    """Scores by servers that the user has started; it writes nothing to them."""

    def __init__(self, chosen: ScoringChoice, policy: Policy, k: int, where: str) -> None:
        """Meet the servers, and prove that they know the policy's tokens and answer for them.

        Args:
            chosen: the recipe's engine.
            policy: the student, whose tokens are to be scored.
            k: likeliest tokens that will be asked for.
            where: the key path of the engine's section.

        Raises:
            EngineError: a server cannot be reached, has another vocabulary, or does not score as it should.
        """
        self._policy, self._chosen, self._where = policy, chosen, where
        self._client = Client()
        try:
            urls = [url.rstrip("/") for url in chosen.urls]
            self._servers = self._client.run(all_of([self._met(url, k) for url in urls]))
        except BaseException:
            self._client.close()
            raise

    def score(self, groups: Sequence[Group], k: int, temperature: float = 1.0) -> TopTokens:
        """See `ScoringEngine.score`; other temperatures than 1 are refused."""
        for problem in self._chosen.unlike_vllm(temperature, f"{self._where}: temperature"):
            raise EngineError(problem)
        must_be_askable(self._policy, k, temperature)
        rows = [row for group in groups for row in _rows(group)]
        self._must_fit(rows)
        found = self._client.run(all_of([self._row(number, row, k) for number, row in enumerate(rows)]))
        return self._proved(joined(found, k), groups, k, self._where)

    def close(self) -> None:
        """Leave the servers as they are."""
        self._client.close()

    async def _met(self, url: str, k: int) -> _Server:
        def error(what: str) -> EngineError:
            return EngineError(f"{self._where}: {url}: {what}; start it with: vllm serve TEACHER --max-logprobs {k}")

        async def asked(_: int) -> _Server:
            try:
                met = await first_model(self._client, url, self._chosen.deadline, error)
                server = _Server(url, self._chosen.served or met.model, met.positions)
                probe = vocabulary_probe(self._policy, _SHARED)
                share = (self._client, url, self._chosen.deadline, self._policy, server.model, probe, error)
                await must_share_tokens(*share)
                await self._scores(server, k, error)
            except Unanswered as problem:
                raise Unanswered(f"{url}: {problem}; start it with: vllm serve TEACHER") from problem
            return server

        return await self._persisted(asked)

    async def _scores(self, server: _Server, k: int, error: Error) -> None:
        """Let it score tokens from all over the vocabulary, the last one among them."""
        probe = vocabulary_probe(self._policy, min(_SCORED, server.positions - 1))
        if len(probe) < 2:
            raise error(f"takes no rows ({server.positions} positions)")
        group = Group(probe[:1], [Completion(probe[1:], np.ones(len(probe) - 1, np.bool_))])
        try:
            (row,) = _rows(group)
            found = await self._asked(server, row, k)
        except Refused as refused:
            raise error(f"does not score the policy's tokens ({COMPLETIONS}: {refused})") from refused
        self._proved(found, [group], k, f"{self._where}: {server.url}")

    def _proved(self, found: TopTokens, groups: Sequence[Group], k: int, where: str) -> TopTokens:
        good = checked(found, groups, k, self._policy)
        if isinstance(good, str):
            raise EngineError(f"{where}: vLLM gave {good}")
        return good

    def _must_fit(self, rows: Sequence[_Row]) -> None:
        """vLLM writes a token after each row, which needs a place too."""
        room = min(s.positions for s in self._servers) - 1
        longest = max((len(row.ids) for row in rows), default=0)
        if longest > room:
            raise EngineError(
                f"{self._where}: a prompt and its completion of {longest} tokens, and the server scores at most "
                f"{room}; start it with a larger --max-model-len, or lower max_length or sampling.max_new_tokens"
            )

    async def _row(self, number: int, row: _Row, k: int) -> TopTokens:
        """From one server, or where that failed from the others in turn."""

        async def asked(attempt: int) -> TopTokens:
            server = self._servers[(number + attempt) % len(self._servers)]
            try:
                return await self._asked(server, row, k)
            except Unanswered as error:
                raise Unanswered(f"{server.url}: {error}") from error
            except Refused as error:
                raise EngineError(f"{self._where}: {server.url}: {error}; {ON}") from error

        return await self._persisted(asked)

    async def _asked(self, server: _Server, row: _Row, k: int) -> TopTokens:
        body = {
            "model": server.model,
            "prompt": row.ids.tolist(),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }
        answer = await self._client.ask("POST", server.url + COMPLETIONS, self._chosen.deadline, body)
        try:
            choice = answer.json()["choices"][0]
            if choice["prompt_token_ids"] != body["prompt"]:
                raise Unanswered("scores of other tokens than it was sent")
            return _read(choice["prompt_logprobs"], row, k)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise Unanswered(f"{COMPLETIONS}: an answer of another form ({error!r})") from error

    async def _persisted(self, work: Callable[[int], Coroutine[Any, Any, T]]) -> T:
        async def at_once() -> None:
            """Nothing is done in between."""

        try:
            return await persist(work, self._chosen.retries, at_once)
        except Unanswered as error:
            raise EngineError(f"{self._where}: {error} (tried {self._chosen.retries + 1} times); {ON}") from error


def vocabulary_probe(policy: Policy, length: int) -> Ids:
    """Tokens from all over the policy's vocabulary, the last one among them."""
    unused = set(policy.known.unused)
    ids = [i for i in range(policy.vocabulary) if i not in unused]
    at = np.linspace(0, len(ids) - 1, min(length, len(ids))).round().astype(int)
    return np.array([ids[i] for i in at], np.int32)


def _rows(group: Group) -> list[_Row]:
    """The group's completions that have actions."""
    found = []
    for c in group.completions:
        acts = np.flatnonzero(c.action)
        if len(acts):
            ids = np.concatenate([group.prompt, c.ids[: acts[-1] + 1]])
            found.append(_Row(ids, (len(group.prompt) + acts).astype(np.int32)))
    return found


def _read(places: Sequence[Mapping[str, Mapping[str, float]] | None], row: _Row, k: int) -> TopTokens:
    """vLLM's answer for a row: at each place the likeliest tokens and the row's own, by id."""
    if len(places) != len(row.ids):
        raise Unanswered(f"scores of {len(places)} tokens, and the row has {len(row.ids)}")
    ids_NK = torch.zeros(len(row.action), k, dtype=torch.long)
    logp_NK, logp_N = torch.zeros(len(row.action), k), torch.zeros(len(row.action))
    for n, at in enumerate(row.action.tolist()):
        listed = places[at]
        if listed is None:
            raise Unanswered(f"no score of token {at} of a row")
        logp = {int(token): about["logprob"] for token, about in listed.items()}
        logp = {token: x if x > HIDDEN else float("-inf") for token, x in logp.items()}
        top = sorted(logp, key=lambda token: -logp[token])[:k]
        if len(top) < k:
            raise Unanswered(f"{len(top)} likeliest tokens, not {k}")
        ids_NK[n], logp_NK[n] = torch.tensor(top, dtype=torch.long), torch.tensor([logp[token] for token in top])
        logp_N[n] = logp[int(row.ids[at])]
    return TopTokens(ids_NK, logp_NK, logp_N)
