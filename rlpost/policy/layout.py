"""The layout of a flat batch: segments of one long row, gathered into small padded tiles for attention.

A segment is a run of tokens that attends to itself causally; a branch (a completion of a shared prompt)
attends to its prompt's tokens and then to itself. Segments of similar length share a tile, so padding stays small.

Axes: T flat tokens, B rows of a tile, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    query_BQ: Tensor
    """Index into T of each query; padding points at token 0."""
    key_BK: Tensor
    query_position_BQ: Tensor
    key_position_BK: Tensor
    """Positions within the sequence; FAR for padding."""
    aligned: bool
    """Queries are the keys: plain causal attention needs no mask."""

    def mask(self, window: int | None) -> Tensor | None:
        """[B, 1, Q, K], or None where plain causal attention is the same."""
        if self.aligned and (window is None or window >= self.query_BQ.shape[1]):
            return None
        return visible(self.query_position_BQ, self.key_position_BK, window)


class FlatLayout:
    """The tiles of a flat batch, and where each token's result lies in them."""

    def __init__(self, tiles: Sequence[Tile], result_T: Tensor) -> None:
        self.tiles = list(tiles)
        self.result_T = result_T
        """[T] index of each token among the tiles' queries, padding counted."""
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def to(self, device: torch.device | str) -> FlatLayout:
        """The same layout with its indices on `device`."""
        moved = [
            Tile(
                t.query_BQ.to(device),
                t.key_BK.to(device),
                t.query_position_BQ.to(device),
                t.key_position_BK.to(device),
                t.aligned,
            )
            for t in self.tiles
        ]
        return FlatLayout(moved, self.result_T.to(device))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[1, T, H, D]; see `attention.Layout`."""
        assert query.shape[0] == 1, "a flat batch is one row"
        outputs = []
        for number, tile in enumerate(self.tiles):
            q = _gather(query, tile.query_BQ)
            k, v = _gather(key, tile.key_BK), _gather(value, tile.key_BK)
            mask = self._mask(number, options.window)
            out = scaled_attention(q, k, v, mask, options, causal=mask is None)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.result_T)[None]

    def _mask(self, number: int, window: int | None) -> Tensor | None:
        """Masks depend on the window only, so every layer of a pass reuses them."""
        at = (number, window)
        if at not in self._masks:
            self._masks[at] = self.tiles[number].mask(window)
        return self._masks[at]


def flat_layout(segments: Sequence[Segment], tokens: int) -> FlatLayout:
    """The layout of `tokens` flat tokens that `segments` cover exactly once."""
    whole = sorted((s for s in segments if s.length and not s.prefix), key=lambda s: s.length)
    branches = sorted((s for s in segments if s.length and s.prefix), key=lambda s: (s.prefix, s.length))
    tiles, results, offset = [], np.zeros(tokens, np.int64), 0
    for rows in [*_bunches(whole), *_bunches(branches)]:
        tile = _tile(rows)
        for row, s in enumerate(rows):
            first = offset + row * tile.query_BQ.shape[1]
            results[s.start : s.start + s.length] = np.arange(first, first + s.length)
        offset += tile.query_BQ.numel()
        tiles.append(tile)
    return FlatLayout(tiles, torch.from_numpy(results))


def _bunches(rows: Sequence[Segment]) -> list[list[Segment]]:
    """Neighbours in sorted order, as long as padding stays below a third or so and a tile within its budget."""
    bunches: list[list[Segment]] = []
    for s in rows:
        if bunches:
            longest = max(max(r.length for r in bunches[-1]), s.length)
            shortest = min(min(r.length for r in bunches[-1]), s.length)
            prefixes = [r.prefix for r in bunches[-1]] + [s.prefix]
            close = longest <= 1.5 * shortest + 16 and max(prefixes) <= 1.5 * min(prefixes) + 16
            if close and longest * (len(bunches[-1]) + 1) <= TILE_TOKENS:
                bunches[-1].append(s)
                continue
        bunches.append([s])
    return bunches


def _tile(rows: Sequence[Segment]) -> Tile:
    queries, prefixes = max(s.length for s in rows), max(s.prefix for s in rows)
    length, prefix, start, prefix_start = (
        np.array([getattr(s, name) for s in rows], np.int64)[:, None]
        for name in ("length", "prefix", "start", "prefix_start")
    )
    column = np.arange(queries)
    own = np.where(column < length, start + column, 0)
    # A padding query stands where the last real one does: a query that sees no key at all would be NaN.
    position = prefix + np.minimum(column, length - 1)
    key_position = np.where(column < length, prefix + column, FAR)
    if not prefixes:
        return Tile(_t(own), _t(own), _t(position), _t(key_position), aligned=True)
    before = np.arange(prefixes)
    keys = np.concatenate([np.where(before < prefix, prefix_start + before, 0), own], 1)
    positions = np.concatenate([np.where(before < prefix, before, FAR), key_position], 1)
    return Tile(_t(own), _t(keys), _t(position), _t(positions), aligned=False)


def _t(x: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, L, D] the tokens of x [1, H, T, D] at index [B, L]."""
    rows = x[0].transpose(0, 1).reshape(x.shape[2], -1).index_select(0, index.flatten())
    return rows.view(*index.shape, x.shape[1], -1).transpose(1, 2)
