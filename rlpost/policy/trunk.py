"""The layers of a pre-norm transformer over a flat batch, forward and backward, each as one operation of autograd.

A transformers layer records some forty operations; each reads and writes all tokens, and most keep a tensor for the
backward pass. Here a layer keeps its input, the residual stream in its middle, gate and up, and what attention needs;
norms, which cost little, are computed once more backward. Projections of one input are one product (products.py), and
so are their gradients.

What is recognised: RMSNorm, linear q, k, v (with or without biases and head norms), rotary positions, SwiGLU and
residuals, with low-rank adapters on any of the projections. Anything else keeps the model's own forward, and
trunk_check.py compares states and gradients of the two at load.

Axes: T tokens, D hidden width, H query heads, K key heads, F width of the feed-forward part, d of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlpost.objectives.ragged import widen
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.layout import FlatLayout
from rlpost.policy.products import Joined, layer_of
from rlpost.policy.recognise import norm_of, part, window_of
from rlpost.policy.tile_attention import Heads, scale_of
from rlpost.policy.trunk_ops import Attended, LayerOps, Norm, Place, layer_ops


class _Normed(torch.autograd.Function):
    """The last norm."""

    @staticmethod
    def forward(ctx: Any, ops: LayerOps, norm: Norm, x: Tensor, weight: Tensor) -> Tensor:
        """[T, D]."""
        _, found, inverse = ops.norm(norm, x)
        ctx.save_for_backward(x, inverse, weight)
        ctx.ops, ctx.norm = ops, norm
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and the weight."""
        x, inverse, _ = ctx.saved_tensors
        return None, None, *ctx.ops.norm_backward(ctx.norm, grad.contiguous(), x, inverse)


@dataclass(frozen=True)
class Block:
    """One layer."""

    norms: tuple[Norm, Norm]
    """Before attention and before the feed-forward part."""
    into: Joined
    """q, k and v."""
    head_norms: tuple[Norm, Norm] | None
    """Of queries and keys."""
    out: Joined
    gate_up: Joined
    down: Joined
    options: AttentionOptions
    heads: Heads

    @property
    def scale(self) -> float:
        """The factor on attention's scores."""
        return scale_of(self.options, self.heads.width)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of everything that is read in vectors."""
        return self.norms[0].weight.shape[0], self.gate_up.weight_OI.shape[0] // 2, *self._head_widths

    @property
    def _head_widths(self) -> tuple[int, ...]:
        return () if self.head_norms is None else (self.heads.width,)

    def parameters(self) -> list[Tensor]:
        """All, in the order of `backward`'s gradients."""
        norms = [n.weight for n in (*self.norms, *(self.head_norms or ()))]
        return [*norms, *(p for j in self.products for p in j.parameters())]

    @property
    def products(self) -> tuple[Joined, Joined, Joined, Joined]:
        """The layer's four."""
        return self.into, self.out, self.gate_up, self.down


def forward(ops: LayerOps, block: Block, place: Place, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """[T, D] the residual stream after a layer, and what `backward` needs besides its input."""
    qkv, low_in = block.into.forward(ops.norm(block.norms[0], x)[1])
    parts, of_heads = _with_head_norms(ops, block, qkv)
    attended, of_attention = ops.attend(Attended(place, block.heads, block.scale, parts))
    added, low_out = block.out.forward(attended)
    middle, normed, _ = ops.norm(block.norms[1], x, added)
    gate_up, low_up = block.gate_up.forward(normed)
    added, low_down = block.down.forward(ops.swiglu(gate_up))
    kept = [qkv, attended, middle, gate_up]
    lows = [y for low in (low_in, low_out, low_up, low_down) for y in low]
    return ops.add(middle, added), [*kept, *of_heads, *lows, *of_attention]


def _parts(block: Block, qkv: Tensor) -> list[Tensor]:
    """Queries, keys and values, as views."""
    h = block.heads
    return list(qkv.split_with_sizes([n * h.width for n in (h.query, h.key, h.key)], 1))


QKV, HEADS = 0, 4
"""Where `forward` keeps queries, keys and values of all heads; and normed queries, 1/RMS, normed keys, 1/RMS."""


def _attended_parts(block: Block, qkv: Tensor, of_heads: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values as attention reads them, of what `forward` kept."""
    parts = _parts(block, qkv)
    if block.head_norms is not None:
        parts[:2] = of_heads[:4:2]
    return parts


def _with_head_norms(ops: LayerOps, block: Block, qkv: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What attention reads; queries and keys normed and their 1/RMS, if the layer norms them."""
    parts = _parts(block, qkv)
    kept = []
    for side, norm in enumerate(block.head_norms or ()):
        _, normed, inverse = ops.norm(norm, _by_head(block, parts[side]))
        parts[side] = normed.view(len(qkv), -1)
        kept += [parts[side], inverse]
    return parts, kept


def _by_head(block: Block, x: Tensor) -> Tensor:
    """[T·heads, d] in at least float32."""
    return widen(x).reshape(-1, block.heads.width)


def backward(
    ops: LayerOps,
    block: Block,
    place: Place,
    x: Tensor,
    kept: Sequence[Tensor],
    grad: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a layer's input, and of `block.parameters()` as far as they are wanted."""
    kept_left = iter(kept)
    qkv, attended, middle, gate_up = (next(kept_left) for _ in range(4))
    of_heads = [next(kept_left) for _ in block.head_norms or () for _ in ("normed", "inverse")]
    lows = [[next(kept_left) for layer in j.layers for _ in layer.adapters] for j in block.products]
    wants = list(_shares(wanted[2 + len(block.head_norms or ()) :], block.products))

    of_added = grad.to(gate_up.dtype)
    of_inner, of_low = block.down.input_gradient(of_added)
    of_gate_up, inner = ops.swiglu_backward(gate_up, of_inner)
    of_down = block.down.gradients(of_added, inner, lows[3], of_low, wants[3])
    _, normed, inverse = ops.norm(block.norms[1], middle)
    of_normed, of_gates = block.gate_up.backward(of_gate_up, normed, lows[2], wants[2])
    of_middle, of_norm_2 = ops.norm_backward(block.norms[1], of_normed, middle, inverse, grad)

    of_attended, of_out = block.out.backward(of_middle.to(gate_up.dtype), attended, lows[1], wants[1])
    read = Attended(place, block.heads, block.scale, _attended_parts(block, qkv, of_heads))
    of_qkv = ops.attend_backward(read, of_attended, attended, list(kept_left))
    of_head_norms = _through_head_norms(ops, block, qkv, of_heads[1::2], of_qkv)
    _, normed, inverse = ops.norm(block.norms[0], x)
    of_normed, of_into = block.into.backward(of_qkv, normed, lows[0], wants[0])
    of_x, of_norm = ops.norm_backward(block.norms[0], of_normed, x, inverse, of_middle)
    return of_x, [of_norm, of_norm_2, *of_head_norms, *of_into, *of_out, *of_gates, *of_down]


def _through_head_norms(
    ops: LayerOps, block: Block, qkv: Tensor, inverses: Sequence[Tensor], of_qkv: Tensor
) -> list[Tensor]:
    """Gradients of the head norms' weights; those of queries and keys are replaced by those before the norms."""
    found = []
    pieces = zip(block.head_norms or (), _parts(block, qkv), _parts(block, of_qkv), inverses, strict=False)
    for norm, x, grad, inverse in pieces:
        by_head = grad.reshape(-1, block.heads.width)
        of_x, of_weight = ops.norm_backward(norm, by_head, _by_head(block, x), inverse)
        grad.copy_(of_x.view(len(qkv), -1))
        found.append(of_weight)
    return found


def _shares(wanted: Sequence[bool], products: Sequence[Joined]) -> Iterator[Sequence[bool]]:
    first = 0
    for joined in products:
        yield wanted[first : (first := first + len(joined.parameters()))]


class _Layer(torch.autograd.Function):
    """One layer of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, ops: LayerOps, block: Block, place: Place, x: Tensor, *_: Tensor) -> Tensor:
        """[T, D]; the last inputs are the block's parameters, for their gradients."""
        found, kept = forward(ops, block, place, x)
        ctx.save_for_backward(x, *kept)
        ctx.ops, ctx.block, ctx.place = ops, block, place
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and the parameters."""
        x, *kept = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            found = backward(ctx.ops, ctx.block, ctx.place, x, kept, grad.contiguous(), ctx.needs_input_grad[4:])
        of_x, of_parameters = found
        return None, None, None, of_x, *of_parameters


class Trunk:
    """All layers of a model."""

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        """Read a model; nothing is copied.

        Args:
            model: a transformers causal language model, whose linear layers may have adapters of peft.
            bfloat16: products run in it, as under autocast.

        Raises:
            NotRecognised: it has something that is not recognised.
        """
        trunk = model.base_model
        self._embed = part(trunk, "embed_tokens")
        self._rotary = part(trunk, "rotary_emb")
        self._norm = _norm(part(trunk, "norm"))
        self.blocks = [_block(layer, bfloat16) for layer in part(trunk, "layers")]
        dtype, widths = self._norm.weight.dtype, [w for b in self.blocks for w in b.widths]
        self._ops = layer_ops(dtype, widths, bfloat16)
        self._last = layer_ops(dtype, widths, False)

    def states(self, ids_T: Tensor, position_T: Tensor, layout: FlatLayout) -> Tensor:
        """[T, D] the last hidden state after every token."""
        tokens, place, x = self._begin(ids_T, position_T, layout)
        with torch.autocast(x.device.type, enabled=False):
            for block in self.blocks:
                x = _Layer.apply(self._ops, block, place, x, *block.parameters())  # type: ignore[no-untyped-call]
            found: Tensor = _Normed.apply(self._last, self._norm, x, self._norm.weight)  # type: ignore[no-untyped-call]
        return found[:tokens]

    @torch.no_grad()
    def read(self, ids_T: Tensor, position_T: Tensor, layout: FlatLayout) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """[T, D] the last hidden states, and each layer's keys (turned to their positions) and values [1, K, T, d]."""
        tokens, place, x = self._begin(ids_T, position_T, layout)
        cached = []
        with torch.autocast(x.device.type, enabled=False):
            for block in self.blocks:
                x, kept = forward(self._ops, block, place, x)
                parts = _attended_parts(block, kept[QKV], kept[HEADS:])[1:]
                key, value = (widen(y[:tokens]).reshape(tokens, -1, block.heads.width) for y in parts)
                cached.append((place.turned(key).transpose(0, 1)[None], value.transpose(0, 1)[None]))
            return self._last.norm(self._norm, x)[1][:tokens], cached

    def _begin(self, ids_T: Tensor, position_T: Tensor, layout: FlatLayout) -> tuple[int, Place, Tensor]:
        """Tokens, their places, and the residual stream at first."""
        tokens = len(ids_T)
        x = widen(self._embed(ids_T))
        cos, sin = self._rotary(x[None], position_T[None])
        x = F.pad(x, (0, 0, 0, self._ops.rows(tokens) - tokens))
        return tokens, Place(layout, cos[0].contiguous(), sin[0].contiguous()), x

    def serves(self, layout: FlatLayout) -> bool:
        """Whether attention over the rows of a layout can be computed in every layer."""
        return layout.in_blocks and all(self._ops.attends(layout.longest, b.options) for b in self.blocks)


def _block(layer: Any, bfloat16: bool) -> Block:
    """One layer; attribute names as in Llama and the families that follow it."""
    attention, mlp = part(layer, "self_attn"), part(layer, "mlp")
    width = int(part(attention, "head_dim"))
    into, out, gate_up, down = (
        Joined([layer_of(part(owner, name)) for name in names], bfloat16)
        for owner, names in (
            (attention, ("q_proj", "k_proj", "v_proj")),
            (attention, ("o_proj",)),
            (mlp, ("gate_proj", "up_proj")),
            (mlp, ("down_proj",)),
        )
    )
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        norms = _norm(attention.q_norm), _norm(part(attention, "k_norm"))
    q, k = (len(x.weight) // width for x in into.layers[:2])
    return Block(
        (_norm(part(layer, "input_layernorm")), _norm(part(layer, "post_attention_layernorm"))),
        into,
        norms,
        out,
        gate_up,
        down,
        AttentionOptions(part(attention, "scaling"), window_of(attention)),
        Heads(q, k, width),
    )


def _norm(module: Any) -> Norm:
    return Norm(*norm_of(module))
