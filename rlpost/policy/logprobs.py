"""From hidden states to numbers per action: logits exist at scored positions only, a tile at a time.

A caller declares what to compute for every action (`LogitStats`) and reads it by name (`PolicyOutput`).

Axes: N scored positions, n those of a tile, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlpost.kernels.build import why_none
from rlpost.kernels.ops import log_probability
from rlpost.policy.batch import Batch

LOGITS_AT_ONCE = 1 << 26
"""Logits kept for the backward pass (256 MB in float32); beyond it, tiles are recomputed there instead."""

Head = Callable[[Tensor], Tensor]
"""[n, D] hidden states -> [n, V] logits, with all that the model does to them."""
Distributions = Callable[[slice], Tensor]
"""A slice of the N positions -> [n, V] log-probabilities of the whole vocabulary."""


class Teacher(Protocol):
    """A model to imitate."""

    def distributions(self, batch: Batch) -> Distributions:
        """Its distributions at the batch's actions, without gradient."""
        ...


@dataclass(frozen=True)
class DistributionLoss:
    """A loss of whole distributions, computed tile by tile so that they never exist all at once."""

    function: Callable[..., Tensor]
    """Returns [n] the loss, or [n, …] it and more; takes those of `logp_N`, `logp_NV`, `teacher_NV`, `target_N` and of
    `more` that `asks` names."""
    asks: frozenset[str]
    teacher: Teacher | None = None
    """Where `teacher_NV` comes from."""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """Each [N, …]: further numbers of the batch's actions, on its device."""

    def of(
        self, logp_nV: Tensor, logp_n: Tensor, target_n: Tensor, teacher_nV: Tensor | None, where: slice = slice(None)
    ) -> Tensor:
        """[n] or [n, …] the loss of a tile, `where` it is among the N."""
        known = {"logp_N": logp_n, "logp_NV": logp_nV, "teacher_NV": teacher_nV, "target_N": target_n}
        known |= {name: x_N[where] for name, x_N in self.more.items()}
        return self.function(**{name: x for name, x in known.items() if name in self.asks})


@dataclass(frozen=True)
class LogitStats:
    """What a forward pass computes for every action, besides its log-probability."""

    temperature: float = 1.0
    """The one the actions were sampled at; logits are divided by it."""
    entropy: bool = False
    """The entropy of the distribution that the action was drawn from."""
    collision: bool = False
    """The probability that two draws from it are the same token."""
    distribution: bool = False
    """The whole distribution: N·V numbers, so only where they fit."""
    loss: DistributionLoss | None = None
    """A loss that is computed from it."""
    top: int = 0
    """So many of its likeliest tokens, with their log-probabilities."""

    @property
    def only_logprobs(self) -> bool:
        """Whether nothing else is wanted, so that the vocabulary's log-probabilities need not be computed."""
        return not (self.entropy or self.collision or self.distribution or self.loss or self.top)


LOGPROBS = LogitStats()
"""The log-probabilities alone, at temperature 1."""


class PolicyOutput(NamedTuple):
    """What was computed for each action; None for what was not asked for."""

    logp_N: Tensor
    """[N] its log-probability at the temperature asked for."""
    entropy_N: Tensor | None = None
    """[N] the entropy in nats."""
    collision_N: Tensor | None = None
    """[N] log Σ_v p(v)²."""
    distribution_NV: Tensor | None = None
    """[N, V] log-probabilities of the whole vocabulary."""
    loss_N: Tensor | None = None
    """[N] or [N, …] the loss of whole distributions."""
    top_ids_NK: Tensor | None = None
    """[N, K] the likeliest tokens, in falling order."""
    top_logp_NK: Tensor | None = None
    """[N, K] their log-probabilities."""


def score(
    hidden_ND: Tensor,
    head: Head,
    vocabulary: int,
    target_N: Tensor,
    stats: LogitStats = LOGPROBS,
    teacher: Distributions | None = None,
    *,
    compiled: bool = False,
) -> PolicyOutput:
    """Compute what `stats` asks for, of the actions `target_N` taken in the states `hidden_ND`.

    Args:
        hidden_ND: hidden states, or logits if `head` is only to cut them.
        head: hidden states -> logits, which are computed on in at least float32.
        vocabulary: V.
        target_N: the actions.
        stats: what to compute.
        teacher: its distributions at the same actions, if the loss needs them.
        compiled: log-probabilities alone may come from the compiled kernel.
    """
    n = hidden_ND.shape[0]
    tile = max(1, LOGITS_AT_ONCE // 4 // vocabulary) if n * vocabulary > LOGITS_AT_ONCE else max(n, 1)

    def one(hidden_nD: Tensor, where: slice) -> PolicyOutput:
        logits_nV = head(hidden_nD)
        if compiled and stats.only_logprobs and compiled_serves(logits_nV):
            return PolicyOutput(log_probability(logits_nV, target_N[where], 1 / stats.temperature))
        logits_nV = logits_nV if logits_nV.dtype == torch.float64 else logits_nV.float()
        return _tile(logits_nV, target_N, stats, None if teacher is None else teacher(where), where)

    pieces: list[PolicyOutput] = []
    for start in range(0, max(n, 1), tile):
        where = slice(start, min(start + tile, n))
        if n > tile and torch.is_grad_enabled():
            pieces.append(checkpoint(one, hidden_ND[where], where, use_reentrant=False))
        else:
            pieces.append(one(hidden_ND[where], where))
    if len(pieces) == 1:
        return pieces[0]
    return PolicyOutput(
        torch.cat([p.logp_N for p in pieces]), *(_joined(c) for c in zip(*(p[1:] for p in pieces), strict=True))
    )


def compiled_serves(logits_nV: Tensor) -> bool:
    """Whether the compiled kernel reads these logits."""
    known = logits_nV.device.type == "cpu" and logits_nV.dtype in (torch.float32, torch.bfloat16)
    return known and logits_nV.stride(-1) == 1 and not why_none()


def _tile(
    logits_nV: Tensor, target_N: Tensor, stats: LogitStats, teacher_nV: Tensor | None, where: slice
) -> PolicyOutput:
    target_n = target_N[where]
    scaled_nV = logits_nV if stats.temperature == 1.0 else logits_nV / stats.temperature
    if stats.only_logprobs:
        return PolicyOutput(-F.cross_entropy(scaled_nV, target_n, reduction="none"))
    logp_nV = scaled_nV.log_softmax(-1)
    logp_n = logp_nV.gather(1, target_n[:, None])[:, 0]
    top = logp_nV.topk(stats.top) if stats.top else None
    return PolicyOutput(
        logp_n,
        entropy_N=-(logp_nV.exp() * logp_nV).sum(-1) if stats.entropy else None,
        collision_N=(2 * logp_nV).logsumexp(1) if stats.collision else None,
        distribution_NV=logp_nV if stats.distribution else None,
        loss_N=stats.loss.of(logp_nV, logp_n, target_n, teacher_nV, where) if stats.loss else None,
        top_ids_NK=None if top is None else top.indices,
        top_logp_NK=None if top is None else top.values,
    )


def _joined(tiles: tuple[Tensor | None, ...]) -> Tensor | None:
    """A column of several tiles; None if it was not asked for."""
    found = [x for x in tiles if x is not None]
    return torch.cat(found) if found else None
