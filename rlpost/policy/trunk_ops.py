"""What stands between the products of a layer: norms, SwiGLU, attention, each forward and backward.

Twice: in PyTorch's operations, which serve every type, and in compiled ones (rlpost/kernels), which read and write the
tokens once and hold no scores.

Axes: T tokens, D hidden width, H query heads, K key heads, F width of the feed-forward part, d of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.kernels import attention, ops
from rlpost.kernels.build import why_none
from rlpost.objectives.ragged import widen
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.layout import FlatLayout
from rlpost.policy.tile_attention import Heads, blocks_serve, is_plain

ROUND = 64
"""Compiled layers read a multiple of so many tokens: every new number of them is prepared anew by oneDNN."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    weight: Tensor
    eps: float


@dataclass
class Place:
    """Where the tokens of a pass stand."""

    layout: FlatLayout
    cos: Tensor
    """[T, d]."""
    sin: Tensor
    """[T, d]."""

    @cached_property
    def _signed(self) -> tuple[Tensor, Tensor]:
        """[T, 1, d] cosines and sines, the first half of these that of −x₂."""
        half = self.sin.shape[-1] // 2
        return self.cos[:, None], torch.cat([-self.sin[:, :half], self.sin[:, half:]], -1)[:, None]

    def turned(self, x: Tensor) -> Tensor:
        """[T, heads, d] rotary positions applied (Su et al. 2021, arXiv:2104.09864)."""
        cos, sin = self._signed
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    def turned_back(self, grad: Tensor) -> Tensor:
        """The transpose of `turned`."""
        cos, sin = self._signed
        return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1))


@dataclass(frozen=True)
class Attended:
    """What attention reads."""

    place: Place
    """Of the tokens."""
    heads: Heads
    scale: float
    """The factor on the scores."""
    parts: Sequence[Tensor]
    """Queries [T, H·d], keys and values [T, K·d] before positions, each with contiguous rows."""


class LayerOps(Protocol):
    """One of the two."""

    def rows(self, tokens: int) -> int:
        """Rows of the residual stream for so many tokens; those after the tokens are zeros."""
        ...

    def attends(self, longest: int, options: AttentionOptions) -> bool:
        """Whether it serves rows of up to `longest` keys."""
        ...

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] x plus what was added to it, [T, D] that normed, in the products' type, and [T, 1] 1/RMS."""
        ...

    def norm_backward(
        self, norm: Norm, grad: Tensor, x: Tensor, inverse: Tensor, passing: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sum, the residual stream's `passing` included, and of the weight."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[T, F] SiLU(gate) · up (Shazeer 2020, arXiv:2002.05202)."""
        ...

    def swiglu_backward(self, gate_up: Tensor, of_inner: Tensor) -> tuple[Tensor, Tensor]:
        """[T, 2F] the gradient of gate and up, and [T, F] the result once more."""
        ...

    def add(self, x: Tensor, added: Tensor) -> Tensor:
        """[T, D] x + added."""
        ...

    def attend(self, of: Attended) -> tuple[Tensor, list[Tensor]]:
        """[T, H·d] the result of attention, and what `attend_backward` needs."""
        ...

    def attend_backward(self, of: Attended, grad: Tensor, result: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """[T, (H + 2K)·d] gradients of queries, keys and values, side by side."""
        ...


class TorchOps:
    """In PyTorch's operations."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is that of products."""
        self._dtype = dtype

    def rows(self, tokens: int) -> int:
        """None are added."""
        return tokens

    def attends(self, longest: int, options: AttentionOptions) -> bool:
        """In blocks, which long rows are not faster in."""
        return blocks_serve(longest, options)

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `LayerOps`."""
        x = x if added is None else x + added
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(norm.eps).rsqrt_()
        return x, torch.mul(x, inverse).mul_(norm.weight).to(self._dtype), inverse

    def norm_backward(
        self, norm: Norm, grad: Tensor, x: Tensor, inverse: Tensor, passing: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `LayerOps`."""
        plain = x * inverse
        of_weight = torch.mul(grad, plain)
        total = of_weight.flatten(0, -2).sum(0)
        mean = of_weight.mul_(norm.weight).mean(-1, keepdim=True)
        of_x = torch.mul(grad, norm.weight).sub_(plain.mul_(mean)).mul_(inverse)
        return (of_x if passing is None else of_x.add_(passing)), total

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `LayerOps`."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def swiglu_backward(self, gate_up: Tensor, of_inner: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerOps`."""
        gate, up = gate_up.chunk(2, -1)
        shaped = F.silu(gate)
        found = torch.empty_like(gate_up)
        of_gate, of_shaped = found.chunk(2, -1)
        torch.mul(of_inner, shaped, out=of_shaped)
        of_gate.copy_(torch.ops.aten.silu_backward(of_inner * up, gate))
        return found, shaped.mul_(up)

    def add(self, x: Tensor, added: Tensor) -> Tensor:
        """See `LayerOps`."""
        return x + added

    def attend(self, of: Attended) -> tuple[Tensor, list[Tensor]]:
        """See `LayerOps`; scores are float32 at least."""
        heads, layout = of.heads, of.place.layout
        query, key, value = (widen(x) for x in of.parts)
        turned = of.place.turned(torch.cat([query, key], 1).view(len(query), -1, heads.width))
        query, key = (x.flatten(1) for x in turned.split_with_sizes([heads.query, heads.key], 1))
        at = [t.prompt_PK.flatten() for t in layout.tiles if t.prompt_PK is not None]
        prompts = [x.index_select(0, i) for i in at for x in (key, value)]
        result, kept = layout.in_blocks_forward(heads, query * of.scale, key, value, prompts)
        return result.to(self._dtype), kept

    def attend_backward(self, of: Attended, grad: Tensor, result: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """See `LayerOps`."""
        layout = of.place.layout
        (query, key, value), prompts = layout.in_blocks_backward(of.heads, widen(grad), widen(result), kept)
        at = [t.prompt_PK.flatten() for t in layout.tiles if t.prompt_PK is not None]
        for number, index in enumerate(at):
            key.index_add_(0, index, prompts[2 * number])
            value.index_add_(0, index, prompts[2 * number + 1])
        both = torch.cat([query.mul_(of.scale), key], 1).view(len(query), -1, of.heads.width)
        return torch.cat([of.place.turned_back(both).flatten(1), value], 1).to(self._dtype)


class CompiledOps:
    """In C, of float32 or bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is that of products."""
        self._dtype = dtype

    def rows(self, tokens: int) -> int:
        """A multiple of `ROUND`."""
        return -(-tokens // ROUND) * ROUND

    def attends(self, longest: int, options: AttentionOptions) -> bool:
        """Whatever their length."""
        return is_plain(longest, options)

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `LayerOps`."""
        return ops.norm(x, added, norm.weight.float(), norm.eps, self._dtype)

    def norm_backward(
        self, norm: Norm, grad: Tensor, x: Tensor, inverse: Tensor, passing: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `LayerOps`."""
        return ops.norm_backward(grad, x, inverse, norm.weight.float(), passing)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `LayerOps`."""
        return ops.swiglu(gate_up)

    def swiglu_backward(self, gate_up: Tensor, of_inner: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerOps`."""
        return ops.swiglu_backward(gate_up, of_inner)

    def add(self, x: Tensor, added: Tensor) -> Tensor:
        """See `LayerOps`."""
        return ops.add(x, added)

    def attend(self, of: Attended) -> tuple[Tensor, list[Tensor]]:
        """See `LayerOps`."""
        result, total = attention.attend(_inputs(of))
        return result, [total]

    def attend_backward(self, of: Attended, grad: Tensor, result: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """See `LayerOps`."""
        return attention.attend_backward(_inputs(of), grad, result, *kept)


def layer_ops(dtype: torch.dtype, widths: Sequence[int], bfloat16: bool) -> LayerOps:
    """The faster ones that serve.

    Args:
        dtype: of the model's weights.
        widths: of everything that is read in vectors.
        bfloat16: products run in it.
    """
    precision = torch.bfloat16 if bfloat16 else dtype
    known = dtype != torch.float64 and precision in (torch.float32, torch.bfloat16)
    compiled = known and all(w % ops.LINE == 0 for w in widths) and not why_none()
    return CompiledOps(precision) if compiled else TorchOps(precision)


def _inputs(of: Attended) -> attention.Inputs:
    place, (query, key, value) = of.place, of.parts
    return attention.Inputs(place.layout.families, query, key, value, place.cos, place.sin, of.heads.width, of.scale)
