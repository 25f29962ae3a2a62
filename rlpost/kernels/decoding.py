"""One decoding step's attention, and the choice of tokens, by compiled functions.

Axes: B rows, P prompts, H query heads, K key heads, W prompt columns, d width of a head, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.kernels.build import library
from rlpost.kernels.ops import LANES, at, half, same, single

CHUNK = 8
"""Rows of one prompt that are done together, at most; as in decode.c."""


class _Decoding(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "prompt_key", "prompt_value", "chunks")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("begin", "own_key", "own_value")),
        *((name, ctypes.c_int64) for name in ("columns", "room", "length", "first")),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "width")),
        ("scale", ctypes.c_float),
        ("result", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Cached:
    """One layer's cache in float32; keys lie transposed in memory, [.., d, tokens], with `LANES` numbers of slack."""

    prompt_key: Tensor
    """[P, K, W, d]."""
    prompt_value: Tensor
    own_key: Tensor
    """[at least B, K, room, d]."""
    own_value: Tensor


@dataclass(frozen=True)
class Rows:
    """Where rows are."""

    chunks: NDArray[np.int32]
    """[n, 3] a prompt, and the first and the end of some of its rows: see `chunks_of`."""
    begin: NDArray[np.int32]
    """[P] the first column of each prompt."""
    length: int
    """Tokens of each row, the new one included."""
    first: int
    """The column, of prompt and own tokens, from which on a query sees them."""


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
    return like.new_empty(size + LANES)[:size].view(shape)


def decode(qkv: Tensor, cos: Tensor, sin: Tensor, rows: Rows, cached: Cached, heads: int, scale: float) -> Tensor:
    """[B, H·d] attention of a new token a row, whose key and value are put into the cache.

    Args:
        qkv: [B, (H + 2K)·d] queries, keys and values before positions.
        cos: [B, d] float32.
        sin: [B, d].
        rows: where they are.
        cached: the layer's cache.
        heads: H.
        scale: the factor on the scores.
    """
    count, width = cos.shape
    key_heads, room = cached.own_key.shape[1:3]
    step = qkv.element_size() * width
    result = qkv.new_empty(count, heads * width)
    keys = cached.prompt_key.mT, cached.own_key.mT
    given = _Decoding(
        *(at(qkv), at(qkv) + heads * step, at(qkv) + (heads + key_heads) * step, qkv.shape[1]),
        *(single(cos), single(sin), single(keys[0]), single(cached.prompt_value)),
        *(rows.chunks.ctypes.data, len(rows.chunks)),
        *(rows.begin.ctypes.data, single(keys[1]), single(cached.own_value)),
        *(cached.prompt_key.shape[2], room, rows.length, rows.first, heads, key_heads, width, scale),
        same(result, qkv),
    )
    assert qkv.shape[1] == (heads + 2 * key_heads) * width
    if library().decode(ctypes.byref(given), half(qkv), torch.get_num_threads()):
        raise MemoryError("decoding: no memory for the scores of a row")
    return result


def sample(logits: Tensor, uniform: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B] the tokens where the cumulative distributions pass numbers, and [B] their log-probabilities in float32.

    Args:
        logits: [B, V], rows of which may be the beginnings of wider ones.
        uniform: [B] float64 in (0, 1).
        scale: logits are multiplied by it: 1 / temperature.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    assert uniform.dtype == torch.float64
    token, logp = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    uniform = uniform.contiguous()
    library().sample(
        *(logits.data_ptr(), logits.stride(0), at(uniform), scale, at(token), at(logp)),
        *(rows, vocabulary, half(logits), torch.get_num_threads()),
    )
    return token, logp
