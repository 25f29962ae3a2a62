"""From hidden states to numbers per action: logits exist at scored positions only, a tile at a time.

Axes: N scored positions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 26
"""Logits kept for the backward pass (256 MB in float32); beyond it, tiles are recomputed there instead."""

Head = Callable[[Tensor], Tensor]
"""[n, D] hidden states -> [n, V] logits, with all that the model does to them."""


def over_logits(hidden_ND: Tensor, head: Head, vocabulary: int, reduce: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """[N, …] `reduce(logits, where)` over tiles of at-least-float32 logits, `where` the tile's slice of N.

    The log-probability of the target is one `reduce`; entropy and a teacher's KL are others.
    """
    n = hidden_ND.shape[0]
    tile = max(1, LOGITS_AT_ONCE // 4 // vocabulary) if n * vocabulary > LOGITS_AT_ONCE else max(n, 1)

    def one(hidden: Tensor, where: slice) -> Tensor:
        logits = head(hidden)
        return reduce(logits if logits.dtype == torch.float64 else logits.float(), where)

    pieces = []
    for start in range(0, max(n, 1), tile):
        where = slice(start, min(start + tile, n))
        if n > tile and torch.is_grad_enabled():
            pieces.append(checkpoint(one, hidden_ND[where], where, use_reentrant=False))
        else:
            pieces.append(one(hidden_ND[where], where))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def target_logprob(target_N: Tensor, temperature: float = 1.0) -> Callable[[Tensor, slice], Tensor]:
    """A reducer: [n] log-probability of the target of softmax(logits / temperature)."""

    def reduce(logits: Tensor, where: slice) -> Tensor:
        scaled = logits if temperature == 1.0 else logits / temperature
        return -F.cross_entropy(scaled, target_N[where], reduction="none")

    return reduce


Reader = Callable[[Tensor, slice], Tensor]
"""([n, V] log-probabilities of the whole vocabulary, which of the N) -> [n, …]: what else is read off them."""


def with_more(
    target_N: Tensor, temperature: float, entropy: bool, read: Reader | None
) -> Callable[[Tensor, slice], Tensor]:
    """A reducer: [n, 1 + …] log-probability of the target, then the entropy in nats, then what `read` makes."""

    def reduce(logits: Tensor, where: slice) -> Tensor:
        logp = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
        columns = [logp.gather(1, target_N[where][:, None])]
        if entropy:
            columns.append(-(logp.exp() * logp).sum(-1, keepdim=True))
        if read is not None:
            more = read(logp, where)
            columns.append(more[:, None] if more.ndim == 1 else more)
        return torch.cat(columns, 1)

    return reduce
