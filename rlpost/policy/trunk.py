"""The layers of a pre-norm transformer over a flat batch, forward and backward, each as one operation of autograd.

A transformers layer records some forty operations; each reads and writes all tokens, and most keep a tensor for the
backward pass. Here a layer keeps its input, the normed inputs of its products, gate and up, and what attention needs;
projections of one input are one product (products.py), and so are their gradients.

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
from rlpost.policy.tile_attention import Heads, blocks_serve, scale_of


@dataclass(frozen=True)
class Norm:
    """An RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normed x […, D], and 1/RMS […, 1]."""
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(self.eps).rsqrt_()
        return torch.mul(x, inverse).mul_(self.weight), inverse

    def backward(self, grad: Tensor, x: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        plain = x * inverse
        of_weight = torch.mul(grad, plain)
        total = of_weight.flatten(0, -2).sum(0)
        mean = of_weight.mul_(self.weight).mean(-1, keepdim=True)
        of_x = torch.mul(grad, self.weight).sub_(plain.mul_(mean)).mul_(inverse)
        return of_x, total


class _Normed(torch.autograd.Function):
    """The last norm."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, x: Tensor, weight: Tensor) -> Tensor:
        """[T, D]."""
        found, inverse = norm.forward(x)
        ctx.save_for_backward(x, inverse, weight)
        ctx.norm = norm
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and the weight."""
        x, inverse, _ = ctx.saved_tensors
        return None, *ctx.norm.backward(grad, x, inverse)


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

    def parameters(self) -> list[Tensor]:
        """All, in the order of `backward`'s gradients."""
        norms = [n.weight for n in (*self.norms, *(self.head_norms or ()))]
        return [*norms, *(p for j in self.products for p in j.parameters())]

    @property
    def products(self) -> tuple[Joined, Joined, Joined, Joined]:
        """The layer's four."""
        return self.into, self.out, self.gate_up, self.down


@dataclass(frozen=True)
class Place:
    """Where the tokens of a pass stand."""

    layout: FlatLayout
    cos_T1d: Tensor
    sin_T1d: Tensor
    """The first half is that of −x₂."""

    def turned(self, x: Tensor) -> Tensor:
        """[T, heads, d] rotary positions applied (Su et al. 2021, arXiv:2104.09864)."""
        return torch.addcmul(x * self.cos_T1d, x.roll(x.shape[-1] // 2, -1), self.sin_T1d)

    def turned_back(self, grad: Tensor) -> Tensor:
        """The transpose of `turned`."""
        return (grad * self.cos_T1d).add_((grad * self.sin_T1d).roll(grad.shape[-1] // 2, -1))


def forward(block: Block, place: Place, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """[T, D] the residual stream after a layer, and what `backward` needs besides its input."""
    h = block.heads
    normed, inverse = block.norms[0].forward(x)
    qkv, low_in = block.into.forward(normed)
    both, value = qkv.view(len(x), -1, h.width).split_with_sizes([h.query + h.key, h.key], 1)
    of_heads: list[Tensor] = []
    if block.head_norms is not None:
        q, k = both.split_with_sizes([h.query, h.key], 1)
        (q_normed, q_inverse), (k_normed, k_inverse) = (
            n.forward(y) for n, y in zip(block.head_norms, (q, k), strict=True)
        )
        of_heads = [both, q_inverse, k_inverse]
        both = torch.cat([q_normed, k_normed], 1)
    query, key = place.turned(both).split_with_sizes([h.query, h.key], 1)
    query = query * scale_of(block.options, h.width)
    prompts = _prompts(place.layout, key, value)
    attended, of_attention = place.layout.in_blocks_forward(
        h, query.flatten(1), key.flatten(1), value.flatten(1), prompts
    )
    added, low_out = block.out.forward(attended)
    middle = added.add_(x)
    normed_2, inverse_2 = block.norms[1].forward(middle)
    gate_up, low_up = block.gate_up.forward(normed_2)
    gate, up = gate_up.chunk(2, -1)
    inner = F.silu(gate).mul_(up)
    added, low_down = block.down.forward(inner)
    lows = [low_in, low_out, low_up, low_down]
    kept = [
        inverse,
        normed,
        attended,
        middle,
        inverse_2,
        normed_2,
        gate_up,
        *of_heads,
        *(y for low in lows for y in low),
    ]
    return added.add_(middle), [*kept, *of_attention]


def _prompts(layout: FlatLayout, key: Tensor, value: Tensor) -> list[Tensor]:
    """Keys and values [n, K·d] of each prompted tile's prompts."""
    at = [t.prompt_PK.flatten() for t in layout.tiles if t.prompt_PK is not None]
    return [x.flatten(1).index_select(0, i) for i in at for x in (key, value)]


def backward(
    block: Block, place: Place, x: Tensor, kept: Sequence[Tensor], grad: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a layer's input, and of `block.parameters()` as far as they are wanted."""
    kept_left = iter(kept)
    inverse, normed, attended, middle, inverse_2, normed_2, gate_up = (next(kept_left) for _ in range(7))
    of_heads = [next(kept_left) for _ in range(3)] if block.head_norms is not None else []
    lows = [[next(kept_left) for layer in j.layers for _ in layer.adapters] for j in block.products]
    wants = list(_shares(wanted[2 + 2 * (block.head_norms is not None) :], block.products))

    gate, up = gate_up.chunk(2, -1)
    shaped = F.silu(gate)
    of_inner, of_down = block.down.backward(grad, shaped * up, lows[3], wants[3])
    of_gate_up = torch.empty_like(gate_up)
    of_gate, of_shaped = of_gate_up.chunk(2, -1)
    torch.mul(of_inner, shaped, out=of_shaped)
    of_gate.copy_(torch.ops.aten.silu_backward(of_inner.mul_(up), gate))
    of_normed_2, of_gates = block.gate_up.backward(of_gate_up, normed_2, lows[2], wants[2])
    of_middle, of_norm_2 = block.norms[1].backward(of_normed_2, middle, inverse_2)
    of_middle.add_(grad)

    of_attended, of_out = block.out.backward(of_middle, attended, lows[1], wants[1])
    of_qkv, of_head_norms = _attention_backward(block, place, of_attended, attended, of_heads, list(kept_left))
    of_normed, of_into = block.into.backward(of_qkv, normed, lows[0], wants[0])
    of_x, of_norm = block.norms[0].backward(of_normed, x, inverse)
    return of_x.add_(of_middle), [of_norm, of_norm_2, *of_head_norms, *of_into, *of_out, *of_gates, *of_down]


def _attention_backward(
    block: Block, place: Place, grad: Tensor, attended: Tensor, of_heads: Sequence[Tensor], kept: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of q, k, v [T, (H + 2K)·d] before positions, and of the head norms' weights."""
    h, layout = block.heads, place.layout
    (query, key, value), prompts = layout.in_blocks_backward(h, grad, attended, kept)
    at = [t.prompt_PK.flatten() for t in layout.tiles if t.prompt_PK is not None]
    for number, index in enumerate(at):
        key.index_add_(0, index, prompts[2 * number])
        value.index_add_(0, index, prompts[2 * number + 1])
    query.mul_(scale_of(block.options, h.width))
    both = place.turned_back(torch.cat([query, key], 1).view(len(query), -1, h.width))
    of_norms: list[Tensor] = []
    if block.head_norms is not None:
        before, *inverses = of_heads
        pieces = []
        for norm, g, y, inverse in zip(
            block.head_norms,
            both.split_with_sizes([h.query, h.key], 1),
            before.split_with_sizes([h.query, h.key], 1),
            inverses,
            strict=True,
        ):
            piece, of_weight = norm.backward(g, y, inverse)
            pieces.append(piece)
            of_norms.append(of_weight)
        both = torch.cat(pieces, 1)
    return torch.cat([both.flatten(1), value], 1), of_norms


def _shares(wanted: Sequence[bool], products: Sequence[Joined]) -> Iterator[Sequence[bool]]:
    first = 0
    for joined in products:
        yield wanted[first : (first := first + len(joined.parameters()))]


class _Layer(torch.autograd.Function):
    """One layer of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, block: Block, place: Place, x: Tensor, *_: Tensor) -> Tensor:
        """[T, D]; the last inputs are the block's parameters, for their gradients."""
        found, kept = forward(block, place, x)
        ctx.save_for_backward(x, *kept)
        ctx.block, ctx.place = block, place
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and the parameters."""
        x, *kept = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            of_x, of_parameters = backward(ctx.block, ctx.place, x, kept, grad, ctx.needs_input_grad[3:])
        return None, None, of_x, *of_parameters


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
        self._blocks = [_block(layer, bfloat16) for layer in part(trunk, "layers")]

    def states(self, ids_T: Tensor, position_T: Tensor, layout: FlatLayout) -> Tensor:
        """[T, D] the last hidden state after every token."""
        x = widen(self._embed(ids_T))
        cos, sin = self._rotary(x[None], position_T[None])
        half = sin.shape[-1] // 2
        place = Place(layout, cos[0, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[0, :, None])
        with torch.autocast(x.device.type, enabled=False):
            for block in self._blocks:
                x = _Layer.apply(block, place, x, *block.parameters())  # type: ignore[no-untyped-call]
            found: Tensor = _Normed.apply(self._norm, x, self._norm.weight)  # type: ignore[no-untyped-call]
        return found

    def serves(self, layout: FlatLayout) -> bool:
        """Whether attention over the rows of a layout can be computed in blocks in every layer."""
        return layout.in_blocks and all(blocks_serve(layout.longest, b.options) for b in self._blocks)


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
