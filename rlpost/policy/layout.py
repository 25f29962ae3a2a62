"""The layout of a flat batch: segments of one long row, gathered into small padded tiles for attention.

A segment is a run of tokens that attends to itself causally; a branch (a completion of a shared prompt)
attends to its prompt's tokens and then to itself. Segments of similar length share a tile, so padding stays small.

Axes: T flat tokens, B rows of a tile, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlpost.policy.attention import AttentionOptions, scaled_attention, visible
from rlpost.policy.tile_attention import Heads, TileShape, attend, attend_backward, blocks_serve, scale_of, serves

FAR = 1 << 30
"""The position of padding keys: later than every query."""
TILE_TOKENS = 8192
"""Queries of one tile, padding included."""


@dataclass(frozen=True)
class Segment:
    """`length` tokens from `start`, continuing a prompt of `prefix` tokens from `prefix_start` (0: none)."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0


@dataclass(frozen=True)
class Tile:
    """Rows of similar shape, attended in one call."""

    first: int
    """Where its queries begin among all tiles' queries."""
    query_position_BQ: Tensor
    """Positions within the sequence; a padding query has that of its row's last real one."""
    key_position_BK: Tensor
    """Positions of the row's prompt (none for whole segments) and of its own tokens; FAR for padding."""
    prompt_PK: Tensor | None = None
    """Index into T of each distinct prompt's tokens; None for whole segments."""
    prompt_of_B: Tensor | None = None
    """Which of those prompts each row continues."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and queries."""
        return self.query_position_BQ.shape[0], self.query_position_BQ.shape[1]

    @property
    def queries(self) -> slice:
        """Its queries among all tiles' queries."""
        rows, queries = self.shape
        return slice(self.first, self.first + rows * queries)

    def in_blocks(self, heads: Heads) -> TileShape:
        """Its shape for attention in blocks."""
        rows, queries = self.shape
        return TileShape(rows, queries, self.key_position_BK.shape[1] - queries, heads)

    def hidden(self, dtype: torch.dtype) -> Tensor | None:
        """[B, P] 0 where a row's prompt has a token, −∞ where it is padding; None where there is none."""
        prompt_BP = self.key_position_BK[:, : self.key_position_BK.shape[1] - self.shape[1]]
        padding = prompt_BP == FAR
        if not bool(padding.any()):
            return None
        return torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, float("-inf"))

    def of_rows(self, prompts: Tensor, heads: int) -> Tensor:
        """[B, K, P, D] each row's prompt, from the tokens of all prompts [P'·P, K·D]."""
        assert self.prompt_PK is not None
        assert self.prompt_of_B is not None
        each = prompts.view(*self.prompt_PK.shape, heads, -1).transpose(1, 2)
        # Prompts are gathered once each and repeated whole: few large rows to add up in the backward pass.
        return each.index_select(0, self.prompt_of_B)

    def of_prompts(self, rows: Tensor) -> Tensor:
        """[P'·P, K·D] the sums of rows [B, K, P, D]: the transpose of `of_rows`."""
        assert self.prompt_PK is not None
        assert self.prompt_of_B is not None
        _, heads, width, d = rows.shape
        total = rows.new_zeros(len(self.prompt_PK), heads, width, d).index_add_(0, self.prompt_of_B, rows)
        return total.transpose(1, 2).reshape(-1, heads * d)

    def mask(self, window: int | None) -> Tensor | None:
        """[B, 1, Q, K], or None where plain causal attention is the same."""
        if self.prompt_PK is None and (window is None or window >= self.shape[1]):
            return None
        return visible(self.query_position_BQ, self.key_position_BK, window)

    def to(self, device: torch.device | str) -> Tile:
        """The same tile with its indices on `device`."""
        return Tile(
            self.first,
            self.query_position_BQ.to(device),
            self.key_position_BK.to(device),
            None if self.prompt_PK is None else self.prompt_PK.to(device),
            None if self.prompt_of_B is None else self.prompt_of_B.to(device),
        )


class FlatLayout:
    """The tiles of a flat batch, and the index of each token in them."""

    def __init__(self, tiles: Sequence[Tile], token_M: Tensor, place_T: Tensor) -> None:
        """Hold the tiles.

        Args:
            tiles: their queries, padding included, are numbered 0 to M − 1 through all tiles.
            token_M: the token of each query; T for padding.
            place_T: the query of each token: the inverse of `token_M`.
        """
        self.tiles = list(tiles)
        self.token_M = token_M
        self.place_T = place_T
        self.in_blocks = True
        """Attention in blocks of queries (tile_attention.py) where it serves; False: always PyTorch's kernel."""
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self._paddings: dict[tuple[int, torch.dtype], Tensor | None] = {}

    def to(self, device: torch.device | str) -> FlatLayout:
        """The same layout with its indices on `device`."""
        moved = FlatLayout([t.to(device) for t in self.tiles], self.token_M.to(device), self.place_T.to(device))
        moved.in_blocks = self.in_blocks
        return moved

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[1, T, H, D]; see `attention.Layout`."""
        assert query.shape[0] == 1, "a flat batch is one row"
        heads = Heads(query.shape[1], key.shape[1], query.shape[-1])
        if self.in_blocks and serves(query, value) and blocks_serve(self.longest, options):
            tokens = [_tokens(query) * scale_of(options, heads.width), _tokens(key), _tokens(value)]
            at = [t.prompt_PK.flatten() for t in self.tiles if t.prompt_PK is not None]
            prompts = [x for index in at for x in self.prompt_tokens(key, value, index)]
            result: Tensor = _InBlocks.apply(self, heads, *tokens, *prompts)  # type: ignore[no-untyped-call]
        else:
            result = self._attend_tiles(heads, query, key, value, options)
        return result.view(1, len(self.place_T), heads.query, -1)

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
        return max((t.key_position_BK.shape[1] for t in self.tiles), default=0)

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


def flat_layout(segments: Sequence[Segment], tokens: int) -> FlatLayout:
    """The layout of `tokens` flat tokens that `segments` cover exactly once."""
    whole = sorted((s for s in segments if s.length and not s.prefix), key=lambda s: s.length)
    branches = sorted((s for s in segments if s.length and s.prefix), key=lambda s: (s.prefix, s.length))
    tiles: list[Tile] = []
    token_M: list[NDArray[np.int64]] = []
    first = 0
    for rows in [*_bunches(whole), *_bunches(branches)]:
        tile, own_BQ = _tile(rows, first, tokens)
        tiles.append(tile)
        token_M.append(own_BQ.ravel())
        first += own_BQ.size
    every = np.concatenate(token_M) if token_M else np.zeros(0, np.int64)
    place_T = np.zeros(tokens + 1, np.int64)
    place_T[every] = np.arange(first)
    return FlatLayout(tiles, _t(every), _t(place_T[:tokens]))


def _bunches(rows: Sequence[Segment]) -> list[list[Segment]]:
    """Neighbours in sorted order, as long as padding stays below a third or so and a tile within its budget."""
    bunches: list[list[Segment]] = []
    shortest = longest = 0
    for s in rows:
        if bunches:
            low, high = min(shortest, s.length), max(longest, s.length)
            # Sorted by prefix, the first has the shortest.
            close = high <= 1.5 * low + 16 and s.prefix <= 1.5 * bunches[-1][0].prefix + 16
            if close and high * (len(bunches[-1]) + 1) <= TILE_TOKENS:
                bunches[-1].append(s)
                shortest, longest = low, high
                continue
        bunches.append([s])
        shortest = longest = s.length
    return bunches


def _tile(rows: Sequence[Segment], first: int, tokens: int) -> tuple[Tile, NDArray[np.int64]]:
    """The tile of some segments, and the token of each of its queries (`tokens` for padding)."""
    queries, prefixes = max(s.length for s in rows), max(s.prefix for s in rows)
    length, prefix, start = (
        np.array([getattr(s, name) for s in rows], np.int64)[:, None] for name in ("length", "prefix", "start")
    )
    column = np.arange(queries)
    own = np.where(column < length, start + column, tokens)
    # A padding query stands where the last real one does: a query that sees no key at all would be NaN.
    position = _t(prefix + np.minimum(column, length - 1))
    own_position = np.where(column < length, prefix + column, FAR)
    if not prefixes:
        return Tile(first, position, _t(own_position)), own
    distinct = {(s.prefix_start, s.prefix): None for s in rows}
    number = {prompt: at for at, prompt in enumerate(distinct)}
    before = np.arange(prefixes)
    prompts = np.stack([begin + np.minimum(before, n - 1) for begin, n in distinct])
    prompt_position = np.where(before < prefix, before, FAR)
    tile = Tile(
        first,
        position,
        _t(np.concatenate([prompt_position, own_position], 1)),
        _t(prompts),
        torch.tensor([number[s.prefix_start, s.prefix] for s in rows]),
    )
    return tile, own


def _t(x: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))
