"""vLLM's servers as an engine: requests over HTTP, weights through a folder that they read.

Whole weights: a server pauses, reads the folder in place of its weights (`reload_weights`), forgets what it kept of
the earlier ones, and names their version in every answer. An adapter is loaded under a name of its version, which every
request and every answer has. An answer of another version is never taken.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from rlpost import console, ranks
from rlpost.engine.answers import must_fit
from rlpost.engine.params import DEADLINE, EngineChoice
from rlpost.engine.vllm_client import HIDDEN, LONGEST, ON, Client, Refused, Unanswered, all_of, persist
from rlpost.engine.vllm_command import Serving, as_flags
from rlpost.engine.vllm_keeper import LOOK
from rlpost.engine.vllm_meet import APART, GENERATE, Expected, Met, meet, prove
from rlpost.engine.vllm_push import drop_adapter, push_adapter, push_weights
from rlpost.engine.vllm_requests import completion_of, sampling_params
from rlpost.engine.vllm_started import Started, give_back, taken
from rlpost.engine.vllm_weights import must_be_servable
from rlpost.errors import EngineError
from rlpost.policy.memory import free_memory
from rlpost.policy.merge import merged
from rlpost.policy.policy import Policy
from rlpost.policy.saved import save_policy, whole_weights
from rlpost.run.files import disk_errors
from rlpost.types import Completion, Request

T = TypeVar("T")


@dataclass
class _Server:
    url: str
    model: str
    """Its name for its own model."""
    positions: int
    busy: int = 0
    """Tokens, at most, of the completions that this process waits for."""


class VllmServer:
    """Samples from vLLM's servers, which are given the policy's weights."""

    def __init__(self, policy: Policy, chosen: EngineChoice, where: str = "rollouts") -> None:
        """Take servers for `policy`; they are asked, or started, when it has its first weights.

        Args:
            policy: to sample from.
            chosen: the recipe's engine.
            where: the key path of its section.

        Raises:
            ModelError: vLLM cannot sample from it.
        """
        must_be_servable(policy, chosen.merge_adapter, where)
        self._policy, self._chosen, self._where = policy, chosen, where
        self._adapter = policy.has_adapter and not chosen.merge_adapter
        self._serving = Serving.of(policy, adapter=self._adapter)
        self._deadline = chosen.deadline or DEADLINE
        self._client = Client()
        self._servers: list[_Server] = []
        self._homes: dict[bytes, _Server] = {}
        """Which of them has read a prompt."""
        self._started: Started | None = None
        """Only on the first rank."""
        self._restarts = asyncio.Lock()
        self._proved = False
        self._folders: list[Path] = []
        """Weights that were written and may still be read, the oldest first."""
        self._current = Path()
        """Those that the servers have."""
        self._tag = token_hex(4)
        self._name = ""
        self._version: int | None = None
        self._closed = False

    def update_weights(self, policy: Policy, version: int) -> None:
        """See `Engine.update_weights`.

        Raises:
            EngineError: a server cannot be reached or started, or cannot serve this policy.
            DiskError: the weights cannot be written.
        """
        self.stage(policy, version)()

    def stage(self, policy: Policy, version: int) -> Callable[[], None]:
        """See `SideEngine.stage`; raises what `update_weights` does, of both parts."""
        expected = None if self._proved else Expected.of(policy)
        self._proved = True
        weights = whole_weights(policy)
        folder = ranks.from_first(lambda: self._written(policy, weights))
        return partial(self._take, policy, version, folder, expected)

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`."""
        if not requests:
            return []
        self._must_take(requests)
        return self._client.run(all_of([self._completions(r) for r in requests]))

    async def complete(self, request: Request) -> tuple[Completion, ...]:
        """See `FreeEngine.complete`."""
        self._must_take([request])
        return await self._client.awaited(self._completions(request))

    def close(self) -> None:
        """Leave the servers: a user's one without this run's adapter, a started one for the run's next engine.

        Whoever waits for answers in another thread waits no longer. Closing it again does nothing.
        """
        if self._closed:
            return
        self._closed, self._version = True, None
        if ranks.is_first():
            if self._adapter and self._name:
                self._client.run(self._forget(self._servers, self._name))
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)
            if self._started is not None:
                give_back(self._started, usable=not self._restarts.locked())
                self._started = None
        self._client.close()

    def _written(self, policy: Policy, weights: Mapping[str, Any] | None) -> Path:
        """A folder with what servers are to read."""
        with disk_errors(Path(tempfile.gettempdir())):
            folder = Path(tempfile.mkdtemp(prefix="rlpost-weights-"))
            self._folders.append(folder)
            if policy.has_adapter and not self._adapter:
                policy = policy.around(merged(policy.model), bfloat16=False)
            save_policy(policy, folder, weights=weights)
        return folder

    def _take(self, policy: Policy, version: int, folder: Path, expected: Expected | None) -> None:
        """Let the servers read the folder's weights, and sample from them from now on."""
        self._policy, self._version = policy, None
        before = self._name
        self._name, self._servers = ranks.from_first(lambda: self._handed_over(version, folder, expected))
        self._homes.clear()
        self._version = version
        if ranks.is_first():
            if self._adapter and before:
                self._client.run(self._forget(self._servers, before))
            while self._folders[0] != folder:
                shutil.rmtree(self._folders.pop(0), ignore_errors=True)

    def _handed_over(self, version: int, folder: Path, expected: Expected | None) -> tuple[str, list[_Server]]:
        """Give all servers the weights in a folder; returns the weights' name there, and the servers."""
        self._name, self._current = f"rlpost-{self._tag}-{version}", folder
        self._servers = self._servers or self._opened(folder)
        self._client.run(all_of([self._given(server, folder, expected) for server in self._servers]))
        return self._name, self._servers

    def _opened(self, folder: Path) -> list[_Server]:
        """The servers that the recipe names, or one that is started; each has been looked at."""
        urls = [url.rstrip("/") for url in self._chosen.urls]
        if not urls:
            urls = [self._start(folder).url]
        return self._client.run(all_of([self._met(url) for url in urls]))

    def _start(self, folder: Path) -> Started:
        """A server of the run's."""
        policy = self._policy
        serving = self._serving.started(self._chosen, policy.device)
        config = policy.causal_lm.config.to_json_string()
        model = self._serving.base if self._adapter else config
        wanted = Started(self._chosen.program, as_flags(serving.args), serving.environment, model, self._where)
        self._started = taken(wanted)
        if self._started is None:
            free_memory(policy.device)
            wanted.start(*self._read_at_start(folder))
            self._started = wanted
        return self._started

    def _read_at_start(self, folder: Path) -> tuple[str, Path]:
        """The folders, or the hub's name, of the model and of the tokenizer."""
        return self._serving.base if self._adapter else str(folder), folder

    async def _met(self, url: str) -> _Server:
        command = self._serving.command

        async def asked(_: int) -> Met:
            try:
                return await meet(
                    self._client, url, self._deadline, self._policy, adapter=self._adapter, command=command
                )
            except Unanswered as error:
                raise Unanswered(f"{url}: {error}; start it with: {command}") from error

        met = await self._persist(asked)
        return _Server(url, met.model, met.positions)

    async def _given(self, server: _Server, folder: Path, expected: Expected | None) -> None:
        """Give one server the weights, and compare what it says of some rows with what is expected."""
        try:
            await self._persist(lambda _: self._push(server, folder))
            gap = 0.0
            if expected is not None:
                model = self._name if self._adapter else server.model
                asked = partial(prove, self._client, server.url, self._deadline, self._policy, model, expected)
                gap = await self._persist(lambda _: asked())
        except Refused as error:
            raise EngineError(f"{server.url}: {error}; start it with: {self._serving.command}") from error
        if gap > max(APART, self._chosen.gap_limit):
            raise EngineError(
                f"{server.url}: its log-probabilities are {gap:.2g} nats a token from the policy's, though it has read "
                f"the policy's weights: it has another model; start it with: {self._serving.command}"
            )

    async def _push(self, server: _Server, folder: Path) -> None:
        push = push_adapter if self._adapter else push_weights
        try:
            await push(self._client, server.url, self._deadline, folder, self._name)
        except Unanswered as error:
            raise Unanswered(f"{server.url}: {error}") from error

    async def _forget(self, servers: Sequence[_Server], name: str) -> None:
        """Let servers forget an adapter that nobody asks for any more; one that does not loses some memory."""
        for server in servers:
            with suppress(Unanswered, Refused):
                await drop_adapter(self._client, server.url, min(self._deadline, LONGEST), name)

    def _must_take(self, requests: Sequence[Request]) -> None:
        """Raise EngineError if requests are too long, or come before the weights."""
        if self._version is None:
            raise EngineError("the engine has no weights yet: call update_weights first")
        must_fit(requests, self._policy.max_positions)
        must_fit(requests, min(s.positions for s in self._servers), "the server's (--max-model-len)")

    async def _completions(self, request: Request) -> tuple[Completion, ...]:
        """Each is a request of its own, with a seed of its own; all go to the server that has read the prompt."""
        numbers = range(request.first, request.first + request.n)
        least = min(self._servers, key=lambda s: s.busy)
        home = self._homes.setdefault(request.prompt.tobytes(), least)
        home.busy += request.n * request.limit
        try:
            return tuple(await all_of([self._persist(partial(self._completion, request, n, home)) for n in numbers]))
        finally:
            home.busy -= request.n * request.limit

    async def _completion(self, request: Request, number: int, home: _Server, attempt: int) -> Completion:
        """From its home, or where that failed from the others in turn."""
        server = self._servers[(self._servers.index(home) + attempt) % len(self._servers)]
        policy = self._policy
        sampling = sampling_params(request, number, policy.end_ids, policy.known.unused)
        body = {
            "model": self._name if self._adapter else server.model,
            "token_ids": request.prompt.tolist(),
            "sampling_params": sampling | {"detokenize": bool(sampling["stop"])},
        }
        try:
            answer = await self._client.ask("POST", server.url + GENERATE, self._deadline, body)
            ids, logprobs, finish = self._read(answer.json())
        except (Unanswered, ValueError, KeyError, IndexError, TypeError) as error:
            what = error if isinstance(error, Unanswered) else f"an answer of another form ({error!r})"
            raise Unanswered(f"{server.url}: {what}") from error
        except Refused as error:
            raise EngineError(f"{self._where}: {server.url}: {error}; {ON}") from error
        return completion_of(ids, logprobs, finish, request, policy, self._version, self._where)

    def _read(self, answer: Mapping[str, Any]) -> tuple[list[int], list[float], str]:
        """Ids, log-probabilities and how it ended, of an answer of this version's.

        Raises:
            Unanswered: it is of another version, or broken off.
        """
        choice = answer["choices"][0]
        ids: list[int] = choice["token_ids"]
        versions = {answer["model"]} if self._adapter else {span["version"] for span in choice["weight_versions"]}
        if versions != {self._name}:
            found = " and ".join(sorted(map(str, versions))) or "no version"
            raise Unanswered(
                f"an answer from weights {found} instead of {self._name}: it was started again, or others give it "
                "weights, and each run needs a server of its own"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise Unanswered(f"it broke off ({choice['finish_reason']})")
        drawn = choice["logprobs"]["content"]
        if [token["token_id"] for token in drawn] != ids:
            raise Unanswered("log-probabilities of other tokens than it drew")
        logprobs: list[float] = [token["logprob"] for token in drawn]
        return ids, [x if x > HIDDEN else float("nan") for x in logprobs], choice["finish_reason"]

    async def _persist(self, work: Callable[[int], Coroutine[Any, Any, T]]) -> T:
        """What `work`, of the number of the attempt, returns at the first attempt that succeeds.

        Raises:
            EngineError: none of them did.
        """
        try:
            return await persist(work, self._chosen.retries, self._restart)
        except Unanswered as error:
            problem = str(error)
        if self._started is not None and not self._started.lives:
            problem = f"{problem}: the server has ended: {self._started.cause()}"
        raise EngineError(f"{self._where}: {problem} (tried {self._chosen.retries + 1} times); {ON}")

    async def _restart(self) -> None:
        """Start the run's own server again, with the current weights, if it has ended."""
        started = self._started
        if started is None or not self._servers or ranks.count() > 1:  # other ranks would not learn where it is
            return
        (server,) = self._servers
        await asyncio.sleep(2 * LOOK)  # by then it is known
        async with self._restarts:
            if started.lives:
                return
            console.warn(f"{self._where}: the server has ended, and is started again: {started.cause()}")
            await asyncio.to_thread(started.start, *self._read_at_start(self._current))
            server.url = started.url
            await self._push(server, self._current)
