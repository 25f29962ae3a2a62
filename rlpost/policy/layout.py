"""The layout of a flat batch: segments of one long row, gathered into small padded tiles for attention.

A segment is a run of tokens that attends to itself causally; a branch (a completion of a shared prompt)
attends to its prompt's tokens and then to itself. Segments of similar length share a tile, so padding stays small.

Axes: T flat tokens, B rows of a tile, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.policy.attention import AttentionOptions, scaled_attention, visible

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
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def to(self, device: torch.device | str) -> FlatLayout:
        """The same layout with its indices on `device`."""
        return FlatLayout([t.to(device) for t in self.tiles], self.token_M.to(device), self.place_T.to(device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[1, T, H, D]; see `attention.Layout`."""
        assert query.shape[0] == 1, "a flat batch is one row"
        query_M, key_M, value_M = (
            _ToTiles.apply(_tokens(x), self.token_M, self.place_T)  # type: ignore[no-untyped-call]
            for x in (query, key, value)
        )
        heads, kv_heads = query.shape[1], key.shape[1]
        outputs = []
        for number, tile in enumerate(self.tiles):
            q, k, v = (_rows(x, tile, n) for x, n in ((query_M, heads), (key_M, kv_heads), (value_M, kv_heads)))
            if tile.prompt_PK is not None:
                keys, values = self.prompt_tokens(key, value, tile.prompt_PK.flatten())
                k, v = _after_prompt(keys, k, tile), _after_prompt(values, v, tile)
            mask = self._mask(number, options.window)
            out = scaled_attention(q, k, v, mask, options, causal=mask is None)
            outputs.append(out.transpose(1, 2).reshape(-1, heads * v.shape[-1]))
        result: Tensor = _FromTiles.apply(torch.cat(outputs), self.token_M, self.place_T)  # type: ignore[no-untyped-call]
        return result.view(1, len(self.place_T), heads, -1)

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


def _padded_select(x_TF: Tensor, token_M: Tensor) -> Tensor:
    return torch.cat([x_TF, x_TF.new_zeros(1, x_TF.shape[1])]).index_select(0, token_M)


def _tokens(x: Tensor) -> Tensor:
    """[T, H·D] from [1, H, T, D]."""
    return x[0].transpose(0, 1).reshape(x.shape[2], -1)


def _rows(x_MF: Tensor, tile: Tile, heads: int) -> Tensor:
    """[B, H, Q, D] a tile's rows."""
    rows, queries = tile.shape
    return x_MF[tile.first : tile.first + rows * queries].view(rows, queries, heads, -1).transpose(1, 2)


def _after_prompt(tokens: Tensor, own: Tensor, tile: Tile) -> Tensor:
    """[B, H, K, D] each row's prompt, then its own tokens `own` [B, H, Q, D]; `tokens` [P·K, H·D] are the prompts'."""
    assert tile.prompt_PK is not None
    assert tile.prompt_of_B is not None
    prompts = tokens.view(*tile.prompt_PK.shape, own.shape[1], -1)
    # Prompts are gathered once each and repeated whole: few large rows to add up in the backward pass.
    return torch.cat([prompts.transpose(1, 2).index_select(0, tile.prompt_of_B), own], 2)


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
