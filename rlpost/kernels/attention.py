"""Causal attention over the segments of a flat batch by the compiled kernel, forward and backward.

Axes: T tokens, H query heads, K key heads, d width of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlpost.kernels.build import library
from rlpost.kernels.ops import half, same, single


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("segments", "families")),
        *((name, ctypes.c_int64) for name in ("count", "most_tokens", "most_keys")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "width")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("result", "total")),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "of_query", "of_key", "of_value")),
        ("stride", ctypes.c_int64),
    )


class Families:
    """Segments by the tokens that they share: a prompt and its completions, or a row by itself."""

    def __init__(self, segments: Sequence[tuple[int, int, int, int]]) -> None:
        """Group them.

        Args:
            segments: (start, length, start of its prompt, length of its prompt) each.
        """
        rows = np.array(segments, np.int32).reshape(-1, 4)
        rows = rows[rows[:, 1] > 0]
        start, length, prompt_start, prompt = rows.T
        first = np.where(prompt > 0, np.minimum(start, prompt_start), start)
        end = np.where(prompt > 0, np.maximum(start + length, prompt_start + prompt), start + length)
        order = np.argsort(first, kind="stable")
        first, end = first[order], np.maximum.accumulate(end[order]) if len(order) else end
        begins = np.flatnonzero(np.concatenate([[True], first[1:] >= end[:-1]])) if len(order) else order
        ends = np.append(begins[1:], len(order))
        self.segments: NDArray[np.int32] = np.ascontiguousarray(rows[order])
        families = np.stack([first[begins], end[ends - 1], begins, ends], 1) if len(order) else np.zeros((0, 4))
        # The largest first, so that no thread is left with it at the end.
        size = families[:, 1] - families[:, 0]
        self.families: NDArray[np.int32] = np.ascontiguousarray(families[np.argsort(-size, kind="stable")], np.int32)
        self.end = int(end.max(initial=0))
        """Tokens that they cover."""
        self.most_tokens = int(size.max(initial=0))
        self.most_keys = int((-(-prompt // 16) * 16 + length).max(initial=0))


@dataclass(frozen=True)
class Inputs:
    """Of one layer's attention."""

    families: Families
    query: Tensor
    """[T, H·d], each row contiguous, before positions are applied."""
    key: Tensor
    """[T, K·d]."""
    value: Tensor
    """[T, K·d]."""
    cos: Tensor
    """[T, d] float32."""
    sin: Tensor
    """[T, d]."""
    width: int
    """d."""
    scale: float
    """The factor on the scores."""

    @property
    def heads(self) -> int:
        """H."""
        return self.query.shape[1] // self.width

    def structure(self, result: Tensor, total: Tensor) -> _Attention:
        """For the kernel."""
        parts = self.query, self.key, self.value
        assert all(x.stride(1) == 1 and x.dtype == self.query.dtype for x in parts)
        f = self.families
        # What does not fit would be read from other tensors' memory.
        assert self.cos.shape == self.sin.shape == (len(self.cos), self.width)
        assert f.end <= len(self.cos) <= len(self.query) == len(self.key) == len(self.value)
        return _Attention(
            *(f.segments.ctypes.data, f.families.ctypes.data, len(f.families), f.most_tokens, f.most_keys),
            *(x.data_ptr() for x in parts),
            *(x.stride(0) for x in parts),
            *(single(self.cos), single(self.sin), self.heads, self.key.shape[1] // self.width, self.width, self.scale),
            *(same(result, self.query), single(total)),
        )


def attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """[T, H·d] the result, and [T, H] what `attend_backward` needs; rows that are in no segment are 0."""
    rows = len(inputs.query)
    result = inputs.query.new_empty(rows, inputs.query.shape[1])
    result[len(inputs.cos) :] = 0
    total = torch.empty(rows, inputs.heads)
    _run(library().attend(ctypes.byref(inputs.structure(result, total)), half(result), torch.get_num_threads()))
    return result, total


def attend_backward(inputs: Inputs, grad: Tensor, result: Tensor, total: Tensor) -> Tensor:
    """[T, (H + 2K)·d] gradients of queries, keys and values before positions, from that of the result [T, H·d]."""
    h, k = inputs.query.shape[1], inputs.key.shape[1]
    found = grad.new_empty(len(grad), h + 2 * k)
    found[len(inputs.cos) :] = 0
    start, step = found.data_ptr(), found.element_size()
    of = _Gradients(same(grad, result), start, start + h * step, start + (h + k) * step, h + 2 * k)
    given = inputs.structure(result, total)
    _run(library().attend_backward(ctypes.byref(given), ctypes.byref(of), half(result), torch.get_num_threads()))
    return found


def _run(failed: int) -> None:
    if failed:
        raise MemoryError("attention: no memory for one prompt with its completions")
