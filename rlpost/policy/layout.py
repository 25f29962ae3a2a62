"""The layout of a flat batch: segments of one long row, gathered into small padded tiles for attention.

A segment is a run of tokens that attends to itself causally; a branch (a completion of a shared prompt)
attends to its prompt's tokens and then to itself. Segments of similar length share a tile, so padding stays small.

Axes: T flat tokens, B rows of a tile, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlpost.kernels.attention import Families
from rlpost.policy.attention import AttentionOptions, scaled_attention
from rlpost.policy.segment_attention import TILES, SegmentAttention
from rlpost.policy.tile_attention import Heads, attend, attend_backward, blocks_serve, scale_of, serves
from rlpost.policy.tiles import Segment, Tile, Tiles, tiles_of


class FlatLayout:
    """The segments of a flat batch; its tiles are made when something reads them."""

    def __init__(self, segments: Sequence[Segment], tokens: int, tiled: Tiles | None = None) -> None:
        """Lay out `tokens` flat tokens that `segments` cover exactly once; `tiled` if the tiles are not of them."""
        self.segments = segments
        self.tokens = tokens
        self._tiled = tiled
        self._device: torch.device | str = "cpu" if tiled is None else tiled.token_M.device
        self.in_blocks = True
        """Attention in blocks of queries (tile_attention.py) where it serves; False: always PyTorch's kernel."""
        self.kernels = TILES
        """Kernels that read segments where they lie."""
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self._paddings: dict[tuple[int, torch.dtype], Tensor | None] = {}

    def to(self, device: torch.device | str) -> FlatLayout:
        """The same layout with its indices on `device`."""
        moved = FlatLayout(self.segments, self.tokens, None if self._tiled is None else self._tiled.to(device))
        moved.in_blocks, moved.kernels, moved._device = self.in_blocks, self.kernels, device
        return moved

    @property
    def _made(self) -> Tiles:
        if self._tiled is None:
            self._tiled = tiles_of(self.segments, self.tokens).to(self._device)
        return self._tiled

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Rows of similar shape."""
        return self._made.tiles

    @property
    def token_M(self) -> Tensor:
        """See `Tiles`."""
        return self._made.token_M

    @property
    def place_T(self) -> Tensor:
        """See `Tiles`."""
        return self._made.place_T

    @cached_property
    def families(self) -> Families:
        """The segments by the tokens that they share, for the compiled kernel."""
        return Families([(s.start, s.length, s.prefix_start, s.prefix) for s in self.segments])

    @cached_property
    def _where_they_lie(self) -> SegmentAttention:
        return SegmentAttention(self.segments, self.tokens, self._device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[1, T, H, D]; see `attention.Layout`."""
        assert query.shape[0] == 1, "a flat batch is one row"
        if self.kernels != TILES:
            found = self._where_they_lie.attend(self.kernels, query, key, value, options)
            if found is not None:
                return found.transpose(1, 2)
        heads = Heads(query.shape[1], key.shape[1], query.shape[-1])
        if self.in_blocks and serves(query, value) and blocks_serve(self.longest, options):
            tokens = [_tokens(query) * scale_of(options, heads.width), _tokens(key), _tokens(value)]
            at = [t.prompt_PK.flatten() for t in self.tiles if t.prompt_PK is not None]
            prompts = [x for index in at for x in self.prompt_tokens(key, value, index)]
            result: Tensor = _InBlocks.apply(self, heads, *tokens, *prompts)  # type: ignore[no-untyped-call]
        else:
            result = self._attend_tiles(heads, query, key, value, options)
        return result.view(1, self.tokens, heads.query, -1)

    def _attend_tiles(
        self, heads: Heads, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """[T, H·D] a tile at a time, by PyTorch's kernel where it serves."""
        query_M, key_M, value_M = (
            _ToTiles.apply(_tokens(x), self.token_M, self.place_T)  # type: ignore[no-untyped-call]
            for x in (query, key, value)
        )
        outputs = []
        for number, tile in enumerate(self.tiles):
            q, k, v = (_rows(x, tile, n) for x, n in ((query_M, heads.query), (key_M, heads.key), (value_M, heads.key)))
            if tile.prompt_PK is not None:
                keys, values = self.prompt_tokens(key, value, tile.prompt_PK.flatten())
                k, v = _after_prompt(keys, k, tile), _after_prompt(values, v, tile)
            mask = self._mask(number, options.window)
            out = scaled_attention(q, k, v, mask, options, causal=mask is None)
            outputs.append(out.transpose(1, 2).reshape(-1, heads.query * v.shape[-1]))
        result: Tensor = _FromTiles.apply(torch.cat(outputs), self.token_M, self.place_T)  # type: ignore[no-untyped-call]
        return result

    @cached_property
    def longest(self) -> int:
        """Keys of the longest row."""
        return max((s.prefix + s.length for s in self.segments), default=0)

    def in_blocks_forward(
        self, heads: Heads, query_TF: Tensor, key_TF: Tensor, value_TF: Tensor, prompts: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Attention in blocks of queries.

        Args:
            heads: how many.
            query_TF: [T, H·D] scaled queries.
            key_TF: [T, K·D].
            value_TF: [T, K·D].
            prompts: of each tile with prompts their keys and their values [n, K·D].

        Returns:
            [T, H·D] the result, and what `in_blocks_backward` needs.
        """
        q, k, v = (_padded_select(x, self.token_M) for x in (query_TF, key_TF, value_TF))
        out, kept, given = torch.empty_like(q), list[Tensor](), iter(prompts)
        for number, tile in enumerate(self.tiles):
            shape = tile.in_blocks(heads)
            before = [next(given) for _ in "kv"] if tile.prompt_PK is not None else (None, None)
            key, value = (
                shape.keys(x[tile.queries], None if p is None else tile.of_rows(p, heads.key))
                for x, p in zip((k, v), before, strict=True)
            )
            of_tile = attend(shape, q[tile.queries], key, value, self._hidden(number, key.dtype), out[tile.queries])
            kept += [key, value, *of_tile]
        return out.index_select(0, self.place_T), kept

    def in_blocks_backward(
        self, heads: Heads, grad_TF: Tensor, result_TF: Tensor, kept: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The transpose of `in_blocks_forward`.

        Args:
            heads: how many.
            grad_TF: [T, H·D] of the result.
            result_TF: the result.
            kept: what `in_blocks_forward` returned.

        Returns:
            Gradients of scaled queries, keys and values of tokens, and those of `prompts`.
        """
        mean_TH = (grad_TF * result_TF).view(-1, heads.query, heads.width).sum(-1)
        grad, mean = (_padded_select(x, self.token_M) for x in (grad_TF, mean_TH))
        dq = torch.empty_like(grad)
        dk, dv = (grad.new_empty(len(grad), heads.key * heads.width) for _ in "kv")
        of_prompts: list[Tensor] = []
        first = 0
        for number, tile in enumerate(self.tiles):
            shape, at = tile.in_blocks(heads), tile.queries
            key, value, *blocks = kept[first : (first := first + shape.kept)]
            found = attend_backward(
                shape, grad[at], mean[at], key, value, self._hidden(number, key.dtype), blocks, dq[at]
            )
            for of_keys, into in zip(found, (dk, dv), strict=True):
                prompt, into[at] = shape.split_keys(of_keys)
                of_prompts += [] if prompt is None else [tile.of_prompts(prompt)]
        return [x.index_select(0, self.place_T) for x in (dq, dk, dv)], of_prompts

    def _hidden(self, number: int, dtype: torch.dtype) -> Tensor | None:
        """The same in every layer of a pass."""
        at = (number, dtype)
        if at not in self._paddings:
            self._paddings[at] = self.tiles[number].hidden(dtype)
        return self._paddings[at]

    def prompt_tokens(self, key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """[n, H'·D] keys and values of tokens of prompts, from those of all tokens [1, H', T, D]."""
        return _tokens(key).index_select(0, index), _tokens(value).index_select(0, index)

    def _mask(self, number: int, window: int | None) -> Tensor | None:
        """Masks depend on the window only, so every layer of a pass reuses them."""
        at = (number, window)
        if at not in self._masks:
            self._masks[at] = self.tiles[number].mask(window)
        return self._masks[at]


class _ToTiles(torch.autograd.Function):
    """[M, F] the tokens [T, F] in the tiles' order, zeros for padding; backward is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, token_M: Tensor, place_T: Tensor) -> Tensor:
        """Gather; the padding's index T reads a row of zeros."""
        ctx.save_for_backward(token_M, place_T)
        return _padded_select(x_TF, token_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """A gather: each token is one query."""
        _, place_T = ctx.saved_tensors
        return grads[0].index_select(0, place_T), None, None


class _FromTiles(torch.autograd.Function):
    """[T, F] the tiles' results [M, F] in the tokens' order: the transpose of `_ToTiles`."""

    @staticmethod
    def forward(ctx: Any, y_MF: Tensor, token_M: Tensor, place_T: Tensor) -> Tensor:
        """Gather."""
        ctx.save_for_backward(token_M, place_T)
        return y_MF.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Padding has no gradient."""
        token_M, _ = ctx.saved_tensors
        return _padded_select(grads[0], token_M), None, None


class _InBlocks(torch.autograd.Function):
    """[T, H·D] attention of all tiles in blocks of queries."""

    @staticmethod
    def forward(ctx: Any, layout: FlatLayout, heads: Heads, *inputs: Tensor) -> Tensor:
        """From scaled queries, keys and values of all tokens, and keys and values of each prompted tile's prompts."""
        query, key, value, *prompts = inputs
        result, kept = layout.in_blocks_forward(heads, query, key, value, prompts)
        ctx.save_for_backward(result, *kept)
        ctx.layout, ctx.heads = layout, heads
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
        """Of the scaled queries, the keys, the values, and of prompts."""
        result, *kept = ctx.saved_tensors
        tokens, prompts = ctx.layout.in_blocks_backward(ctx.heads, grad_TF, result, kept)
        return None, None, *tokens, *prompts


def _padded_select(x_TF: Tensor, token_M: Tensor) -> Tensor:
    return torch.cat([x_TF, x_TF.new_zeros(1, x_TF.shape[1])]).index_select(0, token_M)


def _tokens(x: Tensor) -> Tensor:
    """[T, H·D] from [1, H, T, D]."""
    return x[0].transpose(0, 1).reshape(x.shape[2], -1)


def _rows(x_MF: Tensor, tile: Tile, heads: int) -> Tensor:
    """[B, H, Q, D] a tile's rows."""
    rows, queries = tile.shape
    return x_MF[tile.queries].view(rows, queries, heads, -1).transpose(1, 2)


def _after_prompt(tokens: Tensor, own: Tensor, tile: Tile) -> Tensor:
    """[B, H, K, D] each row's prompt, then its own tokens `own` [B, H, Q, D]; `tokens` [P·K, H·D] are the prompts'."""
    return torch.cat([tile.of_rows(tokens, own.shape[1]), own], 2)
