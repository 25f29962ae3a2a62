"""The layers of a fused decoding step, in PyTorch's operations or in compiled ones (rlpost/kernels).

Axes: B rows, D hidden width, H query heads, K key heads, d of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.kernels import decoding, ops
from rlpost.kernels.build import why_none
from rlpost.objectives.ragged import widen
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.cache import PromptedLayer, PromptedLayout
from rlpost.policy.fast_layers import has_onednn, product
from rlpost.policy.tile_attention import Heads, scale_of

ROWS = 64
"""Rows that oneDNN lays the weights out for; others give the same sums."""
REPEATS = 64
"""Query heads of a key head, at most, in the compiled step."""


class Linear:
    """y = xWᵀ + b with the weight packed for this machine."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        weight = weight.to(dtype)
        packs = weight.device.type == "cpu" and dtype != torch.float64 and has_onednn()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if packs else None
        self._weight = None if packs else weight
        self._bias = None if bias is None else bias.to(dtype)
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[B, out] from [B, in]."""
        x = x.to(self.dtype)
        if self._packed is None:
            assert self._weight is not None
            return F.linear(x, self._weight, self._bias)
        return product(x, self._packed, self._bias)


@dataclass(frozen=True)
class FusedBlock:
    """One layer, ready to run."""

    into: Linear
    """q, k and v of the normed input."""
    out: Linear
    gate_up: Linear
    down: Linear
    eps: tuple[float, float]
    """Of the norms before attention and before the feed-forward part."""
    head_norms: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None
    """(weight, eps) of queries' and keys'."""
    options: AttentionOptions
    heads: Heads
    widths: tuple[int, int]
    """Hidden width, and that of the feed-forward part."""

    def with_head_norms(self, qkv: Tensor) -> Tensor:
        """[B, H + 2K, d] queries and keys each normed by themselves, if the layer does that."""
        h = self.heads
        qkv = qkv.view(len(qkv), -1, h.width)
        if self.head_norms is None:
            return qkv
        sides = qkv.split_with_sizes([h.query, h.key, h.key], 1)
        normed = [_normed(x, eps) * weight for x, (weight, eps) in zip(sides, self.head_norms, strict=False)]
        return torch.cat([x.to(qkv.dtype) for x in (*normed, sides[2])], 1)


Angles = tuple[Tensor, Tensor]
"""[B, d] cosines and sines of the rows' positions."""


def torch_blocks(
    blocks: Sequence[FusedBlock],
    eps: float,
    x: Tensor,
    angles: Angles,
    layers: Sequence[PromptedLayer],
    layout: PromptedLayout,
) -> Tensor:
    """[B, D] the last hidden state, without the weight of its norm.

    Args:
        blocks: the model's layers.
        eps: of the last norm.
        x: [B, D] embeddings.
        angles: of the new tokens.
        layers: their cache.
        layout: of the rows.
    """
    cos, sin = angles
    half = sin.shape[-1] // 2
    # The first half is that of −x₂.
    turn = cos[:, None], torch.cat([-sin[:, :half], sin[:, half:]], -1)[:, None]
    for block, layer in zip(blocks, layers, strict=True):
        h = block.heads
        qkv = block.with_head_norms(block.into(_normed(x, block.eps[0])))
        both, value = qkv[:, : h.query + h.key], qkv[:, h.query + h.key :]
        both = torch.addcmul(both * turn[0], both.roll(half, -1), turn[1])
        query, key, value = both[:, : h.query, None], both[:, h.query :, None], value[:, :, None]
        layer.update(key, value)
        attended = layout.attend(query, key, value, block.options)
        x = x + block.out(attended.reshape(len(x), -1))
        gate, up = block.gate_up(_normed(x, block.eps[1])).chunk(2, -1)
        x = x + block.down(F.silu(gate).mul_(up))
    return _normed(x, eps)


def compiled_serve(blocks: Sequence[FusedBlock], dtype: torch.dtype) -> bool:
    """Whether `compiled_blocks` runs these layers, whose products have this type."""
    return (
        dtype in (torch.float32, torch.bfloat16)
        and all(w % ops.LANES == 0 for b in blocks for w in (*b.widths, b.heads.width))
        and all(b.options.softcap is None and b.options.sinks is None for b in blocks)
        and all(b.heads.repeats <= REPEATS for b in blocks)
        and not why_none()
    )


def compiled_blocks(
    blocks: Sequence[FusedBlock],
    eps: float,
    x: Tensor,
    angles: Angles,
    layers: Sequence[PromptedLayer],
    layout: PromptedLayout,
) -> Tensor:
    """As `torch_blocks`, and the same up to rounding."""
    cos, sin = (side.float().contiguous() for side in angles)
    added: Tensor | None = None
    for block, layer in zip(blocks, layers, strict=True):
        dtype, h = block.into.dtype, block.heads
        x, normed, _ = ops.norm(x, added, None, block.eps[0], dtype)
        qkv = block.with_head_norms(block.into(normed)).view(len(x), -1)
        cached = layer.cached(len(x), h.key, h.width)
        attended = decoding.decode(
            qkv, cos, sin, layout.rows(block.options.window), cached, h.query, scale_of(block.options, h.width)
        )
        x, normed, _ = ops.norm(x, block.out(attended), None, block.eps[1], dtype)
        added = block.down(ops.swiglu(block.gate_up(normed)))
    return ops.norm(x, added, None, eps, blocks[-1].into.dtype)[1]


def _normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without its weight, in at least float32."""
    x = widen(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
