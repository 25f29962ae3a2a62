"""Attention by a layout instead of a mask, inside any transformers model.

A model loaded with `attn_implementation=FLAT` calls `attention` in every layer and hands through the keyword
argument `layout`: the tiles of a flat batch (policy/layout.py) or the rows of a decoding cache (policy/cache.py).
Both decide who sees whom by positions alone: a query sees a key when it is not later, and not further back than
the layer's window.

Axes: B rows, H heads, Q queries, K keys, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

FLAT = "rlpost_flat"
PLAIN = "eager"


@dataclass(frozen=True)
class AttentionOptions:
    """Options of a layer's attention."""

    scaling: float | None = None
    """Factor on the scores; 1/√D by default."""
    window: int | None = None
    """A query sees keys fewer than this many positions back; None: all."""
    softcap: float | None = None
    """Scores become cap·tanh(score/cap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[H] logits of a virtual key without value (gpt-oss)."""


class Layout(Protocol):
    """Who attends to whom."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[B, Q, H, D] from query [B, H, Q, D] and key, value [B, H', K, D], H' dividing H."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers; the check at load covers other arguments of families."""
    assert attention_mask is None, "a layout replaces the mask"
    assert dropout == 0.0, "attention dropout is switched off at load"
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    return layout.attend(query, key, value, AttentionOptions(scaling, window, softcap, s_aux)), None


def visible(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """[B, 1, Q, K] bool from positions [B, Q] and [B, K]; keys at a padding position are beyond every query."""
    distance = query_position[:, None, :, None] - key_position[:, None, None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def scaled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    causal: bool = False,
) -> Tensor:
    """[B, H, Q, D] attention over padded rows; `mask` [B, 1, Q, K] bool, or `causal` for aligned rows without one."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=options.scaling
        )
    scale = query.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    scores = (query @ key.transpose(2, 3)) * scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if options.sinks is not None:
        sink = options.sinks.to(wide.dtype).view(1, -1, 1, 1).expand(*wide.shape[:3], 1)
        weights = torch.cat([wide, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = wide.softmax(-1)
    return weights.to(value.dtype) @ value


def use_attention(model: Any, name: str) -> None:
    """Select an attention implementation for every layer of a transformers model."""
    model.set_attn_implementation(name)


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Switch a model of flat rows to attention by a mask inside, and back afterwards."""
    use_attention(model, PLAIN)
    try:
        yield
    finally:
        use_attention(model, FLAT)


@contextmanager
def flat_attention(model: Any) -> Iterator[None]:
    """Switch a model to attention by a layout inside, and back to what it had."""
    before = model.config._attn_implementation
    if before != FLAT:
        use_attention(model, FLAT)
    try:
        yield
    finally:
        if before != FLAT:
            use_attention(model, before)


def _no_mask(*_: Any, **__: Any) -> None:
    """A layout needs no mask tensor."""


AttentionInterface.register(FLAT, attention)
AttentionMaskInterface.register(FLAT, _no_mask)
