"""One decoding step of all layers in one call.

Axes: B rows, P prompts, D hidden width, H query heads, K key heads, W prompt columns, d width of a head.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.kernels.build import library
from rlpost.kernels.ops import LINE, at, half, same, single

PANEL = 2 * LINE
"""Columns of a packed weight that lie together, as in step.c."""
CHUNK = 8
"""Rows of one prompt that are done together, at most, as in step.c."""
REPEATS = 64
"""Query heads of a key head, at most."""


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Product) for name in ("into", "back", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm")),
        *((name, ctypes.c_float) for name in ("eps", "eps_2", "query_eps", "key_eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("prompt_key", "prompt_value", "own_key", "own_value")),
        ("first", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("count", ctypes.c_int64),
        ("head", _Product),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("rows", "hidden", "inner", "heads", "key_heads", "width")),
        ("chunks", ctypes.c_void_p),
        ("chunk_count", ctypes.c_int64),
        ("begin", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("columns", "room", "length")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "x")),
        *((name, ctypes.c_void_p) for name in ("normed", "qkv", "attended", "gate_up", "shaped", "logits")),
    )


class Packed:
    """A linear layer's weight, laid out in panels."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Pack.

        Args:
            weight: [out, in], `in` even.
            bias: [out].
            dtype: float32 or bfloat16.
        """
        self.outputs, self.inputs = weight.shape
        wide = weight.new_zeros(-(-self.outputs // PANEL) * PANEL, self.inputs, dtype=dtype)
        wide[: self.outputs] = weight
        panels = wide.view(-1, PANEL, self.inputs // 2, 2)
        order = (0, 2, 1, 3) if dtype == torch.bfloat16 else (0, 2, 3, 1)
        self.weight = panels.permute(*order).contiguous()
        self.bias = None if bias is None else bias.float().contiguous()

    def structure(self) -> _Product:
        """For the kernel."""
        return _Product(at(self.weight), None if self.bias is None else single(self.bias), self.inputs, self.outputs)


@dataclass(frozen=True)
class Block:
    """One layer: its weights, with those of the norms before products multiplied into them."""

    into: Packed
    """q, k and v."""
    back: Packed
    """Of attention."""
    gate_up: Packed
    down: Packed
    eps: tuple[float, float]
    """Of the norms before attention and before the feed-forward part."""
    head_norms: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None
    """(weight in float32, eps) of queries' and keys'."""
    scale: float
    """The factor on attention's scores."""
    window: int | None

    def structure(self) -> _Layer:
        """For the kernel, without a cache."""
        (query, query_eps), (key, key_eps) = self.head_norms or ((None, 0.0), (None, 0.0))
        return _Layer(
            *(p.structure() for p in (self.into, self.back, self.gate_up, self.down)),
            *(None if query is None else single(query), None if key is None else single(key)),
            *(*self.eps, query_eps, key_eps, self.scale),
        )


@dataclass(frozen=True)
class Cached:
    """One layer's cache."""

    prompt_key: Tensor
    """[P, K, W, d] float32, transposed in memory, [P, K, d, W], with `LINE` numbers of slack."""
    prompt_value: Tensor
    """[P, K, W, d] float32."""
    own_key: Tensor
    """[at least B, K, room / LINE, d, LINE] of the products' type."""
    own_value: Tensor
    """[at least B, K, room, d]."""


@dataclass(frozen=True)
class Rows:
    """Where rows are."""

    chunks: NDArray[np.int32]
    """[n, 3] a prompt, and the first and the end of some of its rows: see `chunks_of`."""
    begin: NDArray[np.int32]
    """[P] the first column of each prompt."""
    length: int
    """Tokens of each row, the new one included."""


def chunks_of(prompt_of_row: NDArray[np.int64]) -> NDArray[np.int32]:
    """[n, 3] rows of one prompt that are done together, of the prompt of every row (ascending)."""
    found = []
    ends = np.append(np.flatnonzero(np.diff(prompt_of_row)) + 1, len(prompt_of_row))
    first = 0
    for end in ends.tolist():
        found += [(prompt_of_row[first], at, min(at + CHUNK, end)) for at in range(first, end, CHUNK)]
        first = end
    return np.array(found, np.int32).reshape(-1, 3)


def with_slack(like: Tensor, *shape: int) -> Tensor:
    """An empty contiguous tensor, behind which some more numbers may be read."""
    size = math.prod(shape)
    return like.new_empty(size + LINE)[:size].view(shape)


class Step:
    """A model's layers and head."""

    def __init__(self, blocks: Sequence[Block], head: Packed, eps: float, heads: tuple[int, int, int]) -> None:
        """Hold them.

        Args:
            blocks: all layers, whose widths are multiples of `LINE`.
            head: with the weight of the last norm multiplied into it.
            eps: of the last norm.
            heads: H, K and d; at most `REPEATS` query heads a key head.
        """
        self._blocks, self._head, self._eps = blocks, head, eps
        self._heads = heads
        self._layers = (_Layer * len(blocks))(*(b.structure() for b in blocks))
        self._dtype = head.weight.dtype

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, caches: Sequence[Cached]) -> Tensor:
        """[B, V] logits after one more token a row, whose keys and values are put into the caches.

        Args:
            x: [B, D] float32 embeddings; written over.
            cos: [B, d] float32.
            sin: [B, d].
            rows: where they are.
            caches: of the layers.
        """
        count, hidden = x.shape
        heads, key_heads, width = self._heads
        columns, room = caches[0].prompt_key.shape[2], caches[0].own_value.shape[2]
        for layer, block, cached in zip(self._layers, self._blocks, caches, strict=True):
            assert cached.prompt_key.shape[1:] == (key_heads, columns, width)
            assert cached.own_value.shape[1:] == (key_heads, room, width)
            assert cached.own_key.shape[1:] == (key_heads, room // LINE, width, LINE)
            layer.prompt_key, layer.prompt_value = single(cached.prompt_key.mT), single(cached.prompt_value)
            layer.own_key, layer.own_value = (same(x, self._head.weight) for x in (cached.own_key, cached.own_value))
            layer.first = 0 if block.window is None else max(0, columns + rows.length - block.window)
        inner = self._blocks[0].down.inputs
        assert rows.length <= room
        assert cos.shape == sin.shape == (count, width)
        widths = (hidden, (heads + 2 * key_heads) * width, heads * width, 2 * inner, inner, self._head.outputs)
        made = [torch.empty(count, w, dtype=self._dtype) for w in widths]
        given = _Step(
            *(self._layers, len(self._blocks), self._head.structure(), self._eps),
            *(count, hidden, inner, heads, key_heads, width),
            *(rows.chunks.ctypes.data, len(rows.chunks), rows.begin.ctypes.data, columns, room, rows.length),
            *(single(cos), single(sin), single(x), *(at(m) for m in made)),
        )
        if library().step(ctypes.byref(given), half(made[-1]), torch.get_num_threads()):
            raise MemoryError("decoding: no memory for the scores of a row")
        return made[-1]
