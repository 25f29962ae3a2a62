"""Attention of one tile of a flat batch, forward and backward, in blocks of queries.

PyTorch's own kernel on a CPU computes the half of the scores that causality hides, repeats the keys of grouped heads,
and computes everything again for the backward pass. Here a block of queries sees the keys up to its own end and no
more, the heads of a group are rows of one product, and a tile's weights are kept where they are small.

Axes: B rows, H query heads in K groups of R, Q queries, P prompt tokens, S = P + Q keys, D head width; q queries of one
block, e keys that it sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.policy.attention import AttentionOptions

BLOCK = 64
"""Queries of one block."""
KEPT_KEYS = 320
"""Keys of a row up to which weights are kept for the backward pass; they grow with its square."""
LONGEST = 1024
"""Keys of a row up to which this is faster than PyTorch's kernel."""


@dataclass(frozen=True)
class Heads:
    """How heads are grouped."""

    query: int
    key: int
    width: int

    @property
    def repeats(self) -> int:
        """R."""
        return self.query // self.key


def is_plain(longest: int, options: AttentionOptions) -> bool:
    """Whether rows of up to `longest` keys are a causal softmax: no cap, sinks or window changes it."""
    return options.softcap is None and options.sinks is None and (options.window or longest) >= longest


def blocks_serve(longest: int, options: AttentionOptions) -> bool:
    """Whether such rows are attended in blocks."""
    return is_plain(longest, options) and longest <= LONGEST


def serves(query: Tensor, value: Tensor) -> bool:
    """Whether queries [1, H, T, D] and values [1, K, T, D'] are such that blocks are exact and faster: on a CPU."""
    exact = query.dtype == value.dtype and query.dtype in (torch.float32, torch.float64)
    here = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return exact and query.shape[-1] == value.shape[-1] and here


def scale_of(options: AttentionOptions, width: int) -> float:
    """The factor on the scores."""
    return width**-0.5 if options.scaling is None else options.scaling


@dataclass(frozen=True)
class TileShape:
    """A tile, without its tensors."""

    rows: int
    """B."""
    queries: int
    """Q."""
    prompt: int
    """P."""
    heads: Heads

    @property
    def keeps_weights(self) -> bool:
        """Whether weights are kept for the backward pass."""
        return self.prompt + self.queries <= KEPT_KEYS

    @property
    def kept(self) -> int:
        """Tensors that a tile keeps for its backward pass: keys, values, and two a block."""
        return 2 + 2 * -(-self.queries // BLOCK)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(first query, end, keys seen) of each block."""
        for first in range(0, self.queries, BLOCK):
            end = min(self.queries, first + BLOCK)
            yield first, end, self.prompt + end

    def keys(self, x_MF: Tensor, prompt: Tensor | None) -> Tensor:
        """[B·K, S, D] from a tile's rows [B·Q, K·D] after their prompts [B, K, P, D]."""
        h = self.heads
        own = x_MF.view(self.rows, self.queries, h.key, h.width).transpose(1, 2)
        return (own if prompt is None else torch.cat([prompt, own], 2)).reshape(-1, self.prompt + self.queries, h.width)

    def split_keys(self, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        """The gradients of prompts [B, K, P, D] and rows [B·Q, K·D]: the transpose of `keys`."""
        by_row = grad.view(self.rows, self.heads.key, -1, self.heads.width)
        own = by_row[:, :, self.prompt :].transpose(1, 2).reshape(self.rows * self.queries, -1)
        return (by_row[:, :, : self.prompt] if self.prompt else None), own

    def take(self, x_MF: Tensor, first: int, end: int) -> Tensor:
        """[B·K, R·q, D] one block of a tile's rows [B·Q, H·D]."""
        return (
            self._by_query(x_MF)[:, first:end]
            .permute(0, 2, 3, 1, 4)
            .reshape(self.rows * self.heads.key, -1, self.heads.width)
        )

    def put(self, block: Tensor, x_MF: Tensor, first: int, end: int) -> None:
        """Write a block where `take` reads it."""
        h = self.heads
        by_head = block.view(self.rows, h.key, h.repeats, end - first, h.width)
        self._by_query(x_MF)[:, first:end] = by_head.permute(0, 3, 1, 2, 4)

    def _by_query(self, x_MF: Tensor) -> Tensor:
        h = self.heads
        return x_MF.view(self.rows, self.queries, h.key, h.repeats, h.width)

    def scores(self, query: Tensor, key: Tensor, hidden_BP: Tensor | None) -> Tensor:
        """[B·K, R·q, e] of one block with the keys [B·K, e, D] up to its end; −∞ at those that a query does not see."""
        scores = torch.bmm(query, key.transpose(1, 2))
        keys = key.shape[1]
        if hidden_BP is not None:
            by_row = scores.view(self.rows, -1, keys)[..., : self.prompt]
            by_row += hidden_BP[:, None]
        queries = query.shape[1] // self.heads.repeats
        last = scores.view(len(scores), self.heads.repeats, queries, keys)[..., keys - queries :]
        last += torch.full((queries, queries), float("-inf"), dtype=scores.dtype).triu_(1)
        return scores


def attend(
    shape: TileShape, query_MF: Tensor, key: Tensor, value: Tensor, hidden_BP: Tensor | None, out_MF: Tensor
) -> list[Tensor]:
    """Write a tile's attention to `out_MF`.

    Args:
        shape: of the tile.
        query_MF: [B·Q, H·D] its scaled queries.
        key: [B·K, S, D].
        value: [B·K, S, D].
        hidden_BP: 0 where a prompt has a token, −∞ where it is padding; None without padding.
        out_MF: [B·Q, H·D] where to write.

    Returns:
        What `attend_backward` needs, two tensors a block: queries, and weights or the logarithm of their sum.
    """
    kept = []
    for first, end, keys in shape.blocks():
        query = shape.take(query_MF, first, end)
        scores = shape.scores(query, key[:, :keys], hidden_BP)
        weights = torch.softmax(scores, -1)
        shape.put(torch.bmm(weights, value[:, :keys]), out_MF, first, end)
        kept += [query, weights if shape.keeps_weights else torch.logsumexp(scores, -1, keepdim=True)]
    return kept


def attend_backward(
    shape: TileShape,
    grad_MF: Tensor,
    mean_MH: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_BP: Tensor | None,
    kept: Sequence[Tensor],
    grad_query_MF: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of a tile's scaled queries to `grad_query_MF`; return those of its keys and values.

    Args:
        shape: of the tile.
        grad_MF: [B·Q, H·D] of the result.
        mean_MH: [B·Q, H] Σ_s w_s ∂L/∂w_s of every query, which is its result times the result's gradient.
        key: as of `attend`.
        value: as of `attend`.
        hidden_BP: as of `attend`.
        kept: what `attend` returned.
        grad_query_MF: [B·Q, H·D] where to write.

    Returns:
        [B·K, S, D] each.
    """
    h = shape.heads
    mean = mean_MH.view(shape.rows, shape.queries, h.key, h.repeats)
    grad_key = grad_value = key.new_empty(0)
    # The last block sees all keys, so its products are where the others are added.
    for (first, end, keys), query, weights in reversed(
        list(zip(shape.blocks(), kept[::2], kept[1::2], strict=True)),
    ):
        if not shape.keeps_weights:
            weights = shape.scores(query, key[:, :keys], hidden_BP).sub_(weights).exp_()
        grad = shape.take(grad_MF, first, end)
        slope = torch.bmm(grad, value[:, :keys].transpose(1, 2))
        slope.sub_(mean[:, first:end].permute(0, 2, 3, 1).reshape(len(slope), -1, 1)).mul_(weights)
        shape.put(torch.bmm(slope, key[:, :keys]), grad_query_MF, first, end)
        of_key, of_value = torch.bmm(slope.transpose(1, 2), query), torch.bmm(weights.transpose(1, 2), grad)
        if end == shape.queries:
            grad_key, grad_value = of_key, of_value
        else:
            grad_key[:, :keys] += of_key
            grad_value[:, :keys] += of_value
    return grad_key, grad_value
