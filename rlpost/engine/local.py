"""The local engine: decodes in this process with the policy's own model and current weights.

Prompts are computed once, ended rows leave the batch, and tokens are drawn on the model's device. Rows of requests with
`keep` stay in a prefix cache for later prompts. The cache is cleared by the first call without such a request, and by
every update of the weights.

Axes: R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from rlpost.engine.answers import NO_NUMBERS, must_fit
from rlpost.engine.api import Guide, TopTokens
from rlpost.engine.batch import Batch, Row
from rlpost.engine.params import CACHE_GIB
from rlpost.engine.stopping import finished
from rlpost.engine.top_tokens import top_tokens
from rlpost.errors import EngineError
from rlpost.policy.decoders import FlatDecoder, decoding_attention, make_decoder
from rlpost.policy.fused import FusedModel, fused_model
from rlpost.policy.kept import KeptRows
from rlpost.policy.memory import give_back_freed_memory
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, Request

ROWS_AT_ONCE = 512
NO_WEIGHTS = "the engine has no weights yet: call update_weights first"
KEPT_BYTES = 2**27
"""Packed weights of more bytes are dropped after each call, since learning needs the memory."""


class LocalEngine:
    """Samples from a policy in this process."""

    def __init__(
        self,
        policy: Policy,
        rows_at_once: int = ROWS_AT_ONCE,
        guide: Guide | None = None,
        cache_gib: float = CACHE_GIB,
        *,
        fused: bool = True,
    ) -> None:
        """Sample from `policy` once its weights have a version.

        Args:
            policy: samples.
            rows_at_once: completions that run together, at most; the result is the same.
            guide: steers sampling; log-probabilities are those of the guided distribution.
            cache_gib: memory of the prefix cache.
            fused: decode on packed weights where that is exact; else by the model's own forward.
        """
        assert rows_at_once >= 1
        self.policy = policy
        self.guide = guide
        self.rows_at_once = rows_at_once
        self.kept = KeptRows(int(cache_gib * 2**30))
        self._version: int | None = None
        self._fuses = fused
        self._fused: FusedModel | None = None
        """The weights of this version, packed by the first tokens that are drawn with them."""
        self._takes_turns = False
        """They are dropped after each call; neither they nor learning can use the buffers that the other has freed."""

    def update_weights(self, policy: Policy, version: int) -> None:
        """Sample from `policy` from now on; what was kept of earlier weights is cleared."""
        self.policy = policy
        self._version = version
        self._fused = None
        self.kept.clear()

    def close(self) -> None:
        """Clear what is kept."""
        self._fused = None
        self.kept.clear()
        self._version = None

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """The completions of each request; see `Engine.generate`."""
        if self._version is None:
            raise EngineError(NO_WEIGHTS)
        if not any(r.keep for r in requests):
            found = self._generate(requests)
            self.kept.clear()
            return found
        return self._generate(requests)

    def score(self, groups: Sequence[Group], k: int, temperature: float = 1.0) -> TopTokens:
        """What the policy says of the groups' actions, without a guide; see `ScoringEngine.score`."""
        if self._version is None:
            raise EngineError(NO_WEIGHTS)
        return top_tokens(self.policy, groups, k, temperature)

    def _generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        if not requests:
            with self._sampling():  # others may still need this rank's shards
                return []
        must_fit(requests, self.policy.max_positions)
        # Prompts of similar length run together, for less padding; equal ones are computed once.
        prompts = [r.prompt.tobytes() for r in requests]
        first = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
        order = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), first[prompts[i]]))
        owners = [i for i in order for _ in range(requests[i].n)]
        rows = [Row(requests[i], requests[i].first + number) for i in order for number in range(requests[i].n)]
        done: dict[int, list[Completion]] = {i: [] for i in order}
        with self._sampling():
            for start in range(0, len(rows), self.rows_at_once):
                sampled = self._sample(rows[start : start + self.rows_at_once])
                for owner, completion in zip(owners[start : start + len(sampled)], sampled, strict=True):
                    done[owner].append(completion)
        if self._fused is not None and self._fused.bytes > KEPT_BYTES:
            self._fused, self._takes_turns = None, True
            give_back_freed_memory()
        return [tuple(done[i]) for i in range(len(requests))]

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Set the policy up for decoding inside."""
        policy, was_training = self.policy, self.policy.training
        policy.eval()
        try:
            with torch.no_grad(), policy.precision(), decoding_attention(policy), policy.in_turn():
                yield
        finally:
            policy.train(was_training)

    def _packed(self) -> FusedModel | None:
        """The weights packed for single tokens, if that serves the model."""
        if self._fused is None and self._fuses and self.policy.fused and self.policy.sharding is None:
            if self._takes_turns:
                give_back_freed_memory()
            self._fused = fused_model(self.policy)
        return self._fused

    def _sample(self, rows: Sequence[Row]) -> list[Completion]:
        """The completions of one batch."""
        policy = self.policy
        prompts = {r.request.prompt.tobytes(): r.request.prompt for r in rows}
        number = {key: at for at, key in enumerate(prompts)}
        prompt_of_row = [number[r.request.prompt.tobytes()] for r in rows]
        limits = [r.request.limit for r in rows]
        own, kept = list(prompts.values()), self.kept if self.kept.limit else None
        keeps = any(r.request.keep for r in rows)
        decoder = make_decoder(policy, own, prompt_of_row, max(limits), kept, keeps=keeps, fused=self._packed())
        steering = self.guide.begin(own, prompt_of_row, limits) if self.guide is not None else None
        try:
            drawn = Batch(decoder, rows, policy, steering).draw()
        finally:
            if isinstance(decoder, FlatDecoder):
                decoder.close()
        if np.isnan(drawn.logp_RT).any():
            raise EngineError(NO_NUMBERS)
        columns = zip(drawn.ids_RT, drawn.logp_RT, drawn.length_R, drawn.stopped_R, drawn.stops_R, strict=True)
        return [
            finished(ids[:n], logp[:n], bool(stopped), policy.end_ids, stops, self._version)
            for ids, logp, n, stopped, stops in columns
        ]
