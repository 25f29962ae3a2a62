"""Segments of a flat batch gathered into small padded tiles: segments of similar length share one, so padding is small.

Axes: T flat tokens, B rows of a tile, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.devices import moved
from rlpost.policy.attention import visible
from rlpost.policy.tile_attention import Heads, TileShape

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
            moved(self.query_position_BQ, device),
            moved(self.key_position_BK, device),
            None if self.prompt_PK is None else moved(self.prompt_PK, device),
            None if self.prompt_of_B is None else moved(self.prompt_of_B, device),
        )


@dataclass(frozen=True)
class Tiles:
    """The tiles of a flat batch, and the index of each token in them."""

    tiles: tuple[Tile, ...]
    """Their queries, padding included, are numbered 0 to M − 1 through all tiles."""
    token_M: Tensor
    """The token of each query; T for padding."""
    place_T: Tensor
    """The query of each token: the inverse of `token_M`."""

    def to(self, device: torch.device | str) -> Tiles:
        """The same with indices on `device`."""
        return Tiles(tuple(t.to(device) for t in self.tiles), moved(self.token_M, device), moved(self.place_T, device))


def tiles_of(segments: Sequence[Segment], tokens: int) -> Tiles:
    """The tiles of segments that cover `tokens` flat tokens exactly once."""
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
    return Tiles(tuple(tiles), _t(every), _t(place_T[:tokens]))


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
