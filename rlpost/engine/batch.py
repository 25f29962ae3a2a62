"""Samples a batch of rows token by token, each until it ends.

Axes: B rows (live completions), R rows of a batch, T tokens a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.engine.api import Steering
from rlpost.engine.params import Sampling
from rlpost.engine.sampling import choose, is_greedy
from rlpost.engine.seeds import uniforms
from rlpost.engine.stopping import StopStrings
from rlpost.objectives.ragged import widen
from rlpost.policy.decoders import Decoder, FlatDecoder
from rlpost.policy.policy import Policy
from rlpost.types import Request

LEAVE_AT = 0.75
"""Rows that have ended leave once at most this share of the batch still runs."""
LOOK_EVERY = 8
"""On an accelerator, steps between checks for ended rows: each check waits for the device."""


@dataclass(frozen=True)
class Row:
    """One completion to sample."""

    request: Request
    index: int
    """Number of the completion among its prompt's."""


@dataclass(frozen=True)
class Drawn:
    """The sampled tokens of a batch."""

    ids_RT: NDArray[np.int64]
    logp_RT: NDArray[np.floating[Any]]
    length_R: NDArray[np.int64]
    stopped_R: NDArray[np.bool_]
    """True where an end token or a stop string ended the row, False where its limit did."""
    stops_R: Sequence[StopStrings]
    """The stop strings of each row."""


class Batch:
    """The rows of one decoder."""

    def __init__(self, decoder: Decoder, rows: Sequence[Row], policy: Policy, steering: Steering | None) -> None:
        """Prepare to draw; `rows` are in the decoder's order."""
        self._decoder = decoder
        self._rows = rows
        self._policy = policy
        self._steering = steering
        device = policy.device
        limits = [r.request.limit for r in rows]
        shape = len(rows), max(limits)
        noise = uniforms([r.request.seed for r in rows], [r.index for r in rows], shape[1])
        # A step's numbers lie side by side.
        self._noise_TR = torch.from_numpy(np.ascontiguousarray(noise.T)).to(device)
        self._ids_TR = torch.zeros(shape[::-1], dtype=torch.long, device=device)
        self._ended_TR = torch.zeros(shape[::-1], dtype=torch.bool, device=device)
        self._limit_R = torch.tensor(limits, device=device)
        self._limit = self._limit_R
        """Of the live rows."""
        self._ends = torch.tensor(list(policy.end_ids), dtype=torch.long, device=device)
        compiled = isinstance(decoder, FlatDecoder) and decoder.is_fused
        self._choices = _Choices([r.request.sampling for r in rows], policy.tokenizer, device, compiled)
        self._look_every = 1 if device.type == "cpu" else LOOK_EVERY
        longest = policy.max_positions
        self._must_leave_at = {r.request.limit for r in rows if len(r.request.prompt) + r.request.limit == longest}
        """Lengths at which some row has filled the model's positions, and must leave."""
        self._keeps = {i for i, r in enumerate(rows) if r.request.keep} if isinstance(decoder, FlatDecoder) else set()
        self._live = torch.arange(shape[0], device=device)
        self._ended = torch.zeros(shape[0], dtype=torch.bool, device=device)

    def draw(self) -> Drawn:
        """All tokens of all rows."""
        stops = self._choices.stops_of_rows
        logits = self._decoder.start()
        logp_TR = torch.zeros(self._ids_TR.shape, dtype=widen(logits).dtype, device=logits.device)
        most = len(self._ids_TR)
        for t in range(most):
            token, logp = self._choose(logits, t)
            self._put(logp_TR, t, logp.to(logp_TR.dtype))
            if t + 1 == most or (token_left := self._next(token, t)) is None:
                break
            if self._steering is not None:
                self._steering.append(token_left)
            logits = self._decoder.step(token_left)
        self._store(torch.ones_like(self._ended))
        ids_RT, ended_RT, logp_RT = (x.t().contiguous().cpu().numpy() for x in (self._ids_TR, self._ended_TR, logp_TR))
        length_R, stopped_R = _lengths(ended_RT, self._limit_R.cpu().numpy())
        return Drawn(ids_RT, logp_RT, length_R, stopped_R, stops)

    @property
    def _all_live(self) -> bool:
        return len(self._live) == self._ids_TR.shape[1]

    def _put(self, whole_TR: Tensor, t: int, of_live: Tensor) -> None:
        """Record what live rows have at step `t`."""
        if self._all_live:
            whole_TR[t] = of_live
        else:
            whole_TR[t].index_copy_(0, self._live, of_live)

    def _choose(self, logits_BV: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """[B] the rows' tokens number `t` and their log-probabilities; records which rows end with them."""
        logits_BV = self._policy.known.cut(logits_BV)
        if self._steering is not None:
            weight_BV = self._steering.weigh(logits_BV, ~self._over(t))
            logits_BV = widen(logits_BV) + self._choices.scale * weight_BV.to(widen(logits_BV).dtype)
        noise = self._noise_TR[t]
        token, logp = self._choices.choose(logits_BV, noise if self._all_live else noise[self._live])
        self._put(self._ids_TR, t, token)
        self._ended = self._ended | torch.isin(token, self._ends)
        self._ended = self._choices.with_stopped(self._ended, self._ids_TR, self._live, t + 1)
        self._put(self._ended_TR, t, self._ended)
        return token, logp

    def _over(self, length: int) -> Tensor:
        """[B] rows that need no more than the `length` tokens they have."""
        return self._ended | (self._limit <= length)

    def _next(self, token: Tensor, t: int) -> Tensor | None:
        """The tokens of the rows that stay, after ended ones may have left; None if every row has ended."""
        must_leave = t + 1 in self._must_leave_at
        if not must_leave and (t + 1) % self._look_every:
            return token
        over = self._over(t + 1)
        going_on = len(over) - int(over.sum())
        if not going_on:
            return None
        if going_on > LEAVE_AT * len(over) and not must_leave:
            return token
        going = (~over).nonzero()[:, 0]
        self._store(over)
        self._decoder.keep(going)
        if self._steering is not None:
            self._steering.keep(going)
        self._choices.keep(going)
        self._live, self._ended, self._limit = self._live[going], self._ended[going], self._limit[going]
        return token[going]

    def _store(self, leaving: Tensor) -> None:
        """Keep the cache of rows that leave, for later prompts."""
        if not self._keeps:
            return
        assert isinstance(self._decoder, FlatDecoder)
        numbers = self._live.tolist()
        rows = [b for b in leaving.nonzero()[:, 0].tolist() if numbers[b] in self._keeps]
        which = self._live[torch.tensor(rows, dtype=torch.long, device=leaving.device)]
        ids, ended = (x[:, which].t().cpu().numpy() for x in (self._ids_TR, self._ended_TR))
        limits = self._limit_R[which].cpu().numpy()
        lengths, _ = _lengths(ended, limits)
        self._decoder.store_rows(rows, [x[:n] for x, n in zip(ids, lengths, strict=True)])


class _Choices:
    """Chooses tokens and applies stop strings, for rows of one sampling together."""

    def __init__(
        self, samplings: Sequence[Sampling], tokenizer: Any, device: torch.device, compiled: bool = False
    ) -> None:
        distinct: list[Sampling] = []
        for sampling in samplings:
            if not any(sampling is other for other in distinct) and sampling not in distinct:
                distinct.append(sampling)
        self._samplings = distinct
        self._stops = [StopStrings(tokenizer, s.stop) for s in distinct]
        self._device = device
        self._compiled = compiled
        self._number = np.array([0 if len(distinct) == 1 else distinct.index(s) for s in samplings])
        self.stops_of_rows = [self._stops[i] for i in self._number]
        self._group_rows()

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self._number = self._number[rows.cpu().numpy()]
        self._group_rows()

    @property
    def scale(self) -> float | Tensor:
        """Temperature, by row where it differs: weights are multiplied by it, since `choose` divides by it again."""
        scales = [1.0 if is_greedy(s) else s.temperature for s in self._samplings]
        if len(scales) == 1:
            return scales[0]
        return torch.tensor([[scales[i]] for i in self._number], device=self._device)

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B] tokens and their log-probabilities."""
        if len(self._samplings) == 1:
            return choose(logits_BV, uniform_B, self._samplings[0], compiled=self._compiled)
        parts = [choose(logits_BV[rows], uniform_B[rows], s, compiled=self._compiled) for s, _, rows in self._parts]
        order = torch.cat([rows for *_, rows in self._parts]).argsort()
        return torch.cat([token for token, _ in parts])[order], torch.cat([logp for _, logp in parts])[order]

    def with_stopped(self, ended: Tensor, ids_TR: Tensor, live: Tensor, length: int) -> Tensor:
        """[B] ended rows, and those whose last tokens contain a stop string."""
        for _, stops, rows in self._parts:
            if stops:
                recent = ids_TR[max(0, length - stops.tail) : length, live[rows]].t().tolist()
                hit = torch.tensor([stops.hit(tail) for tail in recent], device=self._device)
                ended = ended.index_copy(0, rows, ended[rows] | hit)
        return ended

    def _group_rows(self) -> None:
        """Group the live rows by sampling."""
        numbers = np.unique(self._number).tolist()
        self._parts = [
            (
                self._samplings[i],
                self._stops[i],
                torch.from_numpy(np.flatnonzero(self._number == i)).to(self._device),
            )
            for i in numbers
        ]


def _lengths(ended_RT: NDArray[np.bool_], limit_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[R] tokens of rows, and whether they ended before their limit cut them off."""
    first_R = np.where(ended_RT.any(1), ended_RT.argmax(1) + 1, limit_R + 1)
    return np.minimum(first_R, limit_R), first_R <= limit_R
