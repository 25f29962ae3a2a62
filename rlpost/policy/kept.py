"""A prefix cache: keys and values of earlier rows, for prompts that begin as those rows do.

It is valid for one version of the weights. Every layer has one pool of tokens; a row is a list of places in the pool,
and rows with a common prefix share its places. When memory runs out, the oldest rows are dropped.

Axes: K key heads, D head width, C places of the pool, n some tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.policy.cache import PromptedLayer, PromptedLayout
from rlpost.policy.layout import FlatLayout
from rlpost.policy.tiles import Segment, Tiles, tiles_of
from rlpost.types import Tokens

Places = NDArray[np.int64]
"""Indices of a row's tokens in the pools, in order."""
FIRST_PLACES = 1024
"""Size of a pool at first, in tokens; doubled when it is full."""


@dataclass(frozen=True)
class _Row:
    places: Places
    batch: int
    """When it was added."""


class KeptRows:
    """The prefix cache: rows by their tokens, with keys and values of all layers."""

    def __init__(self, limit: int) -> None:
        """Keep at most `limit` bytes of keys and values."""
        self.limit = limit
        self.reused = 0
        """Prompt tokens that were found here."""
        self.missed = 0
        """Prompt tokens that were not."""
        self.clear()

    def clear(self) -> None:
        """Drop all rows and free their memory."""
        self._pools: list[tuple[Tensor, Tensor]] = []
        """[C, K·D] keys and values of each layer."""
        self._rows: dict[bytes, _Row] = {}
        """Rows by key, the oldest first."""
        self._keys: list[bytes] = []
        """The same keys, sorted: the row with the longest common prefix is next to a prompt's key."""
        self._uses: NDArray[np.int32] = np.zeros(0, np.int32)
        """[C] reference count of each place: rows that contain it, and holders."""
        self._free: list[int] = []
        self._token_bytes = 0
        self._batch = 0

    @property
    def bytes(self) -> int:
        """Memory of the places in use."""
        return (len(self._uses) - len(self._free)) * self._token_bytes

    def find(self, prompt: Tokens) -> Places:
        """Places of the longest kept prefix of the prompt, held until `release`; never the whole prompt."""
        wanted = _key(prompt[:-1])
        at = bisect_left(self._keys, wanted)
        near = self._keys[max(0, at - 1) : at + 1]
        shared = [_common(key, wanted) for key in near]
        best = int(np.argmax(shared)) if shared else 0
        found = self._rows[near[best]].places[: shared[best]] if shared else np.zeros(0, np.int64)
        self.reused += len(found)
        self.missed += len(prompt) - len(found)
        self._uses[found] += 1
        return found

    def begin(self, token_bytes: int) -> None:
        """Begin to add a batch of rows of `token_bytes` a token; only rows of earlier batches may be dropped for it."""
        self._token_bytes = token_bytes
        self._batch += 1

    def add(self, ids: Tokens, before: Places) -> Places | None:
        """Places for a row whose first tokens are at `before`, held until `release`; None if memory is short.

        The caller writes the keys and values of the other tokens.
        """
        key = _key(ids)
        if key not in self._rows:
            places = self._with_room(before, len(ids) - len(before))
            if places is None:
                return None
            self._uses[places] += 1
            self._rows[key] = _Row(places, self._batch)
            insort(self._keys, key)
        held = self._rows[key].places
        self._uses[held] += 1
        return held

    def release(self, held: Sequence[Places]) -> None:
        """Release places from `find` or `add`; those of no kept row become free."""
        for places in held:
            self._uses[places] -= 1
            self._free += places[self._uses[places] == 0].tolist()

    def write(self, layer: int, places: Places, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [n, K, D] to places of a layer; the first calls go through the layers in order."""
        capacity = len(self._uses)
        keys, values = keys.flatten(1), values.flatten(1)
        if layer == len(self._pools):
            self._pools.append((keys.new_empty(capacity, keys.shape[1]), values.new_empty(capacity, values.shape[1])))
        key_pool, value_pool = self._pools[layer]
        if len(key_pool) < capacity:
            self._pools[layer] = _larger(key_pool, capacity), _larger(value_pool, capacity)
        index = torch.from_numpy(places).to(keys.device)
        for pool, new in zip(self._pools[layer], (keys, values), strict=True):
            pool.index_copy_(0, index, new)

    def read(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """[n, K·D] keys and values at some places of a layer."""
        key_pool, value_pool = self._pools[layer]
        return key_pool.index_select(0, index), value_pool.index_select(0, index)

    def _with_room(self, before: Places, more: int) -> Places | None:
        """`before` and `more` free places."""
        most = self.limit // self._token_bytes
        self._uses[before] += 1  # so that `before` is not freed below
        while len(self._free) < more and len(self._uses) < most:
            capacity = len(self._uses)
            larger = min(most, max(2 * capacity, FIRST_PLACES))
            self._uses = np.concatenate([self._uses, np.zeros(larger - capacity, np.int32)])
            self._free += range(larger - 1, capacity - 1, -1)
        while len(self._free) < more and self._drop_oldest():
            pass
        self._uses[before] -= 1
        if len(self._free) < more:
            return None
        taken = [self._free.pop() for _ in range(more)]
        return np.concatenate([before, np.array(taken, np.int64)])

    def _drop_oldest(self) -> bool:
        key = next(iter(self._rows), None)
        if key is None or self._rows[key].batch == self._batch:
            return False
        places = self._rows.pop(key).places
        del self._keys[bisect_left(self._keys, key)]
        self.release([places])
        return True


class Keeping:
    """One decoder's use of the prefix cache: what it finds there, and what it adds."""

    def __init__(self, kept: KeptRows, prompts: Sequence[Tokens]) -> None:
        """Look up the prefixes of its prompts."""
        self.kept = kept
        self._prompts = [np.asarray(p) for p in prompts]
        self.before = [kept.find(p) for p in prompts]
        """Places of each prompt's kept prefix."""
        self._held = list(self.before)
        self._places: list[Places | None] = []
        """Places of each prompt once it is kept; None if memory was short."""
        self._token_bytes = 0

    def with_kept(self, layer: PromptedLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[n, K, D] keys and values of the tokens that were read, followed by those of the kept prefixes."""
        places = np.concatenate(self.before)
        if not len(places):
            return keys, values
        more = self.kept.read(layer.number, torch.from_numpy(places).to(keys.device))
        keys, values = (torch.cat([x, m.view(-1, *x.shape[1:])]) for x, m in zip((keys, values), more, strict=True))
        return keys, values

    def keep_prompts(self, layers: Sequence[PromptedLayer]) -> None:
        """Add the prompts that the prefill passes have read, as far as memory allows."""
        shapes = [x for layer in layers for x in layer.passes[0]]
        self._token_bytes = sum(x.shape[0] * x.shape[2] * x.element_size() for x in shapes)
        self.kept.begin(self._token_bytes)
        to, which, at = [], [], 0
        for prompt, before in zip(self._prompts, self.before, strict=True):
            places = self._add(prompt, before)
            self._places.append(places)
            if places is not None:
                to.append(places[len(before) :])
                which.append(np.arange(at, at + len(to[-1])))
            at += len(prompt) - len(before)
        if to:
            index = torch.from_numpy(np.concatenate(which)).to(shapes[0].device)
            for layer in layers:
                keys, values = layer.read()
                self.kept.write(layer.number, np.concatenate(to), keys[index], values[index])

    def keep_rows(
        self, layers: Sequence[PromptedLayer], rows: Sequence[int], prompts: Sequence[int], ids: Sequence[Tokens]
    ) -> None:
        """Add the tokens of some rows, as far as memory allows.

        Args:
            layers: of the decoder.
            rows: numbers of the decoder's rows.
            prompts: the prompt each continues.
            ids: the tokens of each; the last may not have been read yet.
        """
        if not layers or not (length := layers[0].layout.length):
            return
        self.kept.begin(self._token_bytes)
        to, which = [], []
        for number, (prompt, own) in enumerate(zip(prompts, ids, strict=True)):
            before, read = self._places[prompt], np.asarray(own)[:length]
            places = None if before is None else self._add(np.concatenate([self._prompts[prompt], read]), before)
            if before is not None and places is not None:
                to.append(places[len(before) :])
                which.append(number * length + np.arange(len(read)))
        if to:
            device = layers[0].layout.device
            index, at = torch.from_numpy(np.concatenate(which)).to(device), torch.tensor(list(rows), device=device)
            for layer in layers:
                keys, values = layer.own_tokens(at, index)
                self.kept.write(layer.number, np.concatenate(to), keys, values)

    def close(self) -> None:
        """Release everything the decoder holds."""
        self.kept.release(self._held)
        self._held = []

    def _add(self, ids: Tokens, before: Places) -> Places | None:
        places = self.kept.add(ids, before)
        self._held += [] if places is None else [places]
        return places


class KeptLayout(FlatLayout):
    """A flat row of segments that continue kept prefixes: each attends to its prefix, then to itself."""

    def __init__(
        self, segments: Sequence[Segment], tokens: int, tiled: Tiles, kept: KeptRows, rows: PromptedLayout
    ) -> None:
        """`prompt_PK` of the tiles are places in the pool of the layer that `rows` is at."""
        super().__init__(segments, tokens, tiled)
        self._kept = kept
        self._rows = rows

    def prompt_tokens(self, key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """[n, K·D] keys and values of kept tokens."""
        layer = self._rows.current
        assert layer is not None
        assert layer.latest is not None
        assert layer.latest[0] is key, "attention must follow its own layer's cache update"
        keys, values = self._kept.read(layer.number, index)
        return keys.to(key.dtype), values.to(value.dtype)


def kept_layout(
    lengths: Sequence[int], before: Sequence[Places], kept: KeptRows, rows: PromptedLayout, device: torch.device
) -> FlatLayout:
    """The layout of a flat row of segments with these lengths, each after the kept tokens `before` it."""
    starts = np.cumsum(lengths) - lengths
    offsets = np.cumsum([len(b) for b in before]) - [len(b) for b in before]
    segments = [
        Segment(int(start), n, int(offset), len(b))
        for start, n, offset, b in zip(starts, lengths, offsets, before, strict=True)
    ]
    tokens = sum(lengths)
    flat = tiles_of(segments, tokens)
    every = torch.from_numpy(np.concatenate(before))
    tiles = tuple(t if t.prompt_PK is None else replace(t, prompt_PK=every[t.prompt_PK]) for t in flat.tiles)
    return KeptLayout(segments, tokens, replace(flat, tiles=tiles).to(device), kept, rows)


def _key(ids: Tokens) -> bytes:
    """A key such that rows with a common prefix have keys with a common prefix."""
    return np.asarray(ids).astype(">i4").tobytes()


def _common(a: bytes, b: bytes) -> int:
    """Tokens of the common prefix of two keys."""
    shorter = min(len(a), len(b)) // 4
    x, y = (np.frombuffer(key, ">i4", shorter) for key in (a, b))
    different = np.flatnonzero(x != y)
    return int(different[0]) if len(different) else shorter


def _larger(pool: Tensor, capacity: int) -> Tensor:
    return torch.cat([pool, pool.new_empty(capacity - len(pool), pool.shape[1])])
