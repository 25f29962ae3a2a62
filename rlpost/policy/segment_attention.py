"""Attention over a flat batch where its segments lie, in PyTorch's kernels for CUDA; nothing is gathered or padded.

Two of them: FlexAttention (Dong et al. 2024, arXiv:2412.05496), compiled for a mask that is made of the layout, in
which a completion sees its prompt and itself; and, where no prompt is shared and numbers have 16 bits,
`varlen_attn`, which runs FlashAttention on packed segments. Which of them are exact for a model on a device is found at
load (kernel_check.py).

Axes: T flat tokens, H query heads, K key heads, D head width; blocks of BLOCK queries by BLOCK keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.devices import moved
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.tile_attention import scale_of
from rlpost.policy.tiles import FAR, Segment

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# The kernels' modules bring PyTorch's compiler, which takes a while to import: they are imported where they are used.

BLOCK = 128
"""Queries, and keys, of a block of the mask: the kernels' own size."""
PROGRAMS = 64
"""Ways to compile it in one process; more is an error."""
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernels:
    """Which kernels a model's flat rows may be attended in; where neither may, tiles serve."""

    flex: bool = False
    varlen: bool = False


TILES = Kernels()
"""Neither."""


class SegmentAttention:
    """Attention over the segments of one flat batch; indices and masks are made once for all layers."""

    def __init__(self, segments: Sequence[Segment], tokens: int, device: torch.device | str) -> None:
        """`segments` cover `tokens` flat tokens exactly once; the prompt of each is in the row, before it."""
        self._segments = [s for s in segments if s.length]
        self._tokens = tokens
        self._device = device
        self._masks: dict[int | None, BlockMask] = {}
        self._ends: tuple[Tensor, int] | None = None
        self._caps: dict[float, Callable[..., Tensor]] = {}

    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor | None:
        """[1, H, T, D] from query [1, H, T, D], key and value [1, K, T, D]; None where tiles have to serve.

        Args:
            kernels: those that are exact.
            query: under autocast of any type: it runs in autocast's, as PyTorch's own attention does.
            key: likewise.
            value: likewise.
            options: of the layer; with sinks tiles serve.
        """
        if kernels == TILES or options.sinks is not None or not self._segments:
            return None
        if torch.is_autocast_enabled(query.device.type):
            narrow = torch.get_autocast_dtype(query.device.type)
            query, key, value = (x.to(narrow) for x in (query, key, value))
        if query.dtype != key.dtype or query.dtype != value.dtype:
            return None
        plain = options.softcap is None and not any(s.prefix for s in self._segments)
        if kernels.varlen and plain and query.dtype in HALF:
            return self.varlen(query, key, value, options)
        return self.flex(query, key, value, options) if kernels.flex else None

    def varlen(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[1, H, T, D] by FlashAttention, of segments without prompts and layers without caps and sinks."""
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = self._ends_of_segments()
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        # A query sees so many keys before itself.
        before = -1 if options.window is None else options.window - 1
        found: Any = varlen_attn(
            q, k, v, ends, ends, longest, longest,
            scale=options.scaling, window_size=(before, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        result: Tensor = found.transpose(0, 1)[None]
        return result

    def flex(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[1, H, T, D] by FlexAttention."""
        found: Tensor = _flex(query.device.type)(
            query,
            key,
            value,
            score_mod=None if options.softcap is None else self._capped(options.softcap),
            block_mask=self.mask(options.window),
            scale=scale_of(options, query.shape[-1]),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return found

    def mask(self, window: int | None) -> BlockMask:
        """Which keys a query sees; the same in every layer of that window."""
        from torch.nn.attention.flex_attention import BlockMask

        if window not in self._masks:
            count, index = (
                moved(torch.from_numpy(x), self._device) for x in _blocks(self._segments, self._tokens, window)
            )
            self._masks[window] = BlockMask.from_kv_blocks(
                count[None, None],
                index[None, None],
                BLOCK_SIZE=BLOCK,
                mask_mod=seen(*self._bounds(window)),
                seq_lengths=(self._tokens, self._tokens),
            )
        return self._masks[window]

    def _bounds(self, window: int | None) -> list[Tensor]:
        """[T] each: the first key that a token sees of its segment, the first of its prompt, and that prompt's end."""
        first, prompt, end = (np.zeros(self._tokens, np.int32) for _ in range(3))
        for s in self._segments:
            own = slice(s.start, s.start + s.length)
            hidden = np.maximum(0, s.prefix + np.arange(s.length) + 1 - (window or FAR))
            first[own] = s.start + np.maximum(0, hidden - s.prefix)
            prompt[own] = s.prefix_start + hidden
            end[own] = s.prefix_start + s.prefix
        return [moved(torch.from_numpy(x), self._device) for x in (first, prompt, end)]

    def _capped(self, cap: float) -> Callable[..., Tensor]:
        if cap not in self._caps:
            self._caps[cap] = capped(moved(torch.tensor(cap), self._device))
        return self._caps[cap]

    def _ends_of_segments(self) -> tuple[Tensor, int]:
        """[segments + 1] where segments begin and end, and the length of the longest."""
        if self._ends is None:
            lengths = [s.length for s in sorted(self._segments, key=lambda s: s.start)]
            ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            self._ends = moved(torch.from_numpy(ends), self._device), max(lengths)
        return self._ends


def seen(first_T: Tensor, prompt_T: Tensor, end_T: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's mask: a query sees its segment up to itself, and its prompt; each from where its window begins.

    Tensors alone: a number would be compiled in, or be one that the compiler cannot bind.
    """

    def mask_mod(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((first_T[q] <= k) & (k <= q)) | ((prompt_T[q] <= k) & (k < end_T[q]))

    return mask_mod


def capped(cap: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's change of scores: cap·tanh(score/cap)."""

    def score_mod(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def _blocks(
    segments: Sequence[Segment], tokens: int, window: int | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """[blocks] of queries how many blocks of keys some of them see, and [blocks, blocks] those first, in order."""
    count = -(-tokens // BLOCK)
    sees = np.zeros((count, count), bool)
    for s in segments:
        for row in range(s.start // BLOCK, (s.start + s.length - 1) // BLOCK + 1):
            first = max(s.start, row * BLOCK)
            end = min(s.start + s.length, (row + 1) * BLOCK)
            # The first query of the block sees furthest back.
            back = 0 if window is None else max(0, s.prefix + first - s.start - window + 1)
            if back < s.prefix:
                sees[row, (s.prefix_start + back) // BLOCK : (s.prefix_start + s.prefix - 1) // BLOCK + 1] = True
            sees[row, (s.start + max(0, back - s.prefix)) // BLOCK : (end - 1) // BLOCK + 1] = True
    order = np.argsort(~sees, axis=1, kind="stable")
    return sees.sum(1).astype(np.int32), order.astype(np.int32)


@cache
def _flex(device: str) -> Any:
    """FlexAttention: compiled, but on a CPU, where tests compare its definition with tiles."""
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cpu":
        return flex_attention
    # One program for batches of every length; but precisions, head widths, caps, and a batch of a single block have
    # their own. Beyond the limit scores of all pairs would be computed, and kept.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, PROGRAMS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
