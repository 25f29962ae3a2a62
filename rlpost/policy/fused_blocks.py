"""The layers of a fused decoding step: in PyTorch's operations, or all in one compiled call (rlpost/kernels/step.c).

Axes: B rows, D hidden width, H query heads, K key heads, d of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.kernels import step
from rlpost.kernels.build import why_none
from rlpost.kernels.ops import LINE
from rlpost.objectives.ragged import widen
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.cache import PromptedLayer, PromptedLayout
from rlpost.policy.fast_layers import has_onednn, product
from rlpost.policy.tile_attention import Heads, scale_of

ROWS = 64
"""Rows that oneDNN lays the weights out for; others give the same sums."""


class Affine(NamedTuple):
    """y = xWᵀ + b."""

    weight: Tensor
    """[out, in]."""
    bias: Tensor | None


@dataclass(frozen=True)
class FusedBlock:
    """One layer; the weights of the norms before products are in these."""

    into: Affine
    """q, k and v of the normed input."""
    out: Affine
    gate_up: Affine
    down: Affine
    eps: tuple[float, float]
    """Of the norms before attention and before the feed-forward part."""
    head_norms: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None
    """(weight, eps) of queries' and keys'."""
    options: AttentionOptions
    heads: Heads


class Linear:
    """An affine map with the weight packed for this machine."""

    def __init__(self, of: Affine, dtype: torch.dtype) -> None:
        weight = of.weight.to(dtype)
        packs = weight.device.type == "cpu" and has_onednn(dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if packs else None
        self._weight = None if packs else weight
        self._bias = None if of.bias is None else of.bias.to(dtype)
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[B, out] from [B, in]."""
        x = x.to(self._dtype)
        if self._packed is None:
            assert self._weight is not None
            return F.linear(x, self._weight, self._bias)
        return product(x, self._packed, self._bias)


class TorchStep:
    """In PyTorch's operations, of every type and on every device."""

    def __init__(self, blocks: Sequence[FusedBlock], head: Affine, eps: float, dtype: torch.dtype) -> None:
        """Pack the weights.

        Args:
            blocks: the model's layers.
            head: its head.
            eps: of the last norm.
            dtype: of products.
        """
        self._blocks = blocks
        self._linear = [tuple(Linear(of, dtype) for of in (b.into, b.out, b.gate_up, b.down)) for b in blocks]
        self._head = Linear(head, dtype)
        self._eps = eps

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, layers: Sequence[PromptedLayer], layout: PromptedLayout
    ) -> Tensor:
        """[B, V] logits.

        Args:
            x: [B, D] embeddings.
            cos: [B, d] of the new tokens' positions.
            sin: [B, d].
            layers: their cache.
            layout: of the rows.
        """
        half = sin.shape[-1] // 2
        # The first half is that of −x₂.
        turn = cos[:, None], torch.cat([-sin[:, :half], sin[:, half:]], -1)[:, None]
        for block, (into, out, gate_up, down), layer in zip(self._blocks, self._linear, layers, strict=True):
            h = block.heads
            qkv = into(_normed(x, block.eps[0])).view(len(x), -1, h.width)
            both, value = qkv[:, : h.query + h.key], qkv[:, h.query + h.key :]
            if block.head_norms is not None:
                sides = both.split_with_sizes([h.query, h.key], 1)
                normed = zip(sides, block.head_norms, strict=True)
                both = torch.cat([_normed(side, eps) * weight for side, (weight, eps) in normed], 1)
            both = torch.addcmul(both * turn[0], both.roll(half, -1), turn[1])
            query, key, value = both[:, : h.query, None], both[:, h.query :, None], value[:, :, None]
            layer.update(key, value)
            attended = layout.attend(query, key, value, block.options)
            x = x + out(attended.reshape(len(x), -1))
            gate, up = gate_up(_normed(x, block.eps[1])).chunk(2, -1)
            x = x + down(F.silu(gate).mul_(up))
        return self._head(_normed(x, self._eps))


def compiled_serves(blocks: Sequence[FusedBlock], dtype: torch.dtype) -> bool:
    """Whether `CompiledStep` runs these layers, whose products have this type."""
    widths = {n for b in blocks for n in (b.into.weight.shape[1], b.down.weight.shape[1], b.heads.width)}
    return (
        blocks[0].into.weight.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and all(n % LINE == 0 for n in widths)
        and len({(b.heads, b.down.weight.shape[1]) for b in blocks}) == 1
        and all(b.options.softcap is None and b.options.sinks is None for b in blocks)
        and blocks[0].heads.repeats <= step.REPEATS
        and not why_none()
    )


class CompiledStep:
    """In one call; as `TorchStep`, and the same up to rounding."""

    def __init__(self, blocks: Sequence[FusedBlock], head: Affine, eps: float, dtype: torch.dtype) -> None:
        """Pack the weights; arguments as of `TorchStep`."""
        self._dtype = dtype
        self._heads = blocks[0].heads
        heads = self._heads.query, self._heads.key, self._heads.width
        packed = [_compiled(b, dtype) for b in blocks]
        self._step = step.Step(packed, step.Packed(*head, dtype), eps, heads)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, layers: Sequence[PromptedLayer], layout: PromptedLayout
    ) -> Tensor:
        """[B, V] logits; arguments as of `TorchStep`, of which `x` is written over."""
        h = self._heads
        caches = [layer.cached(len(x), h.key, h.width, self._dtype) for layer in layers]
        return self._step(x, cos.float().contiguous(), sin.float().contiguous(), layout.rows, caches)


def _compiled(block: FusedBlock, dtype: torch.dtype) -> step.Block:
    norms = block.head_norms
    into, out, gate_up, down = (step.Packed(*of, dtype) for of in (block.into, block.out, block.gate_up, block.down))
    return step.Block(
        into,
        out,
        gate_up,
        down,
        block.eps,
        None if norms is None else ((norms[0][0].float(), norms[0][1]), (norms[1][0].float(), norms[1][1])),
        scale_of(block.options, block.heads.width),
        block.options.window,
    )


def _normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without its weight, in at least float32."""
    x = widen(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
