"""The compiled functions on tensors.

Tensors are contiguous and on the CPU. Activations are float32 or bfloat16; the residual stream, weights of norms and
statistics are float32. Widths are multiples of 16.

Axes: T tokens, D hidden width, F width of the feed-forward part, N scored positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from rlpost.kernels.build import library

LINE = 16
"""What widths are multiples of: numbers that lie together, as in common.h."""
PARTS = 32
"""Parts of the tokens over which the gradient of a norm's weight is summed, whatever the number of threads."""


def half(x: Tensor) -> int:
    """1 for bfloat16, 0 for float32."""
    assert x.dtype in (torch.float32, torch.bfloat16)
    return int(x.dtype == torch.bfloat16)


def at(x: Tensor) -> int:
    """The address of its numbers."""
    assert x.is_contiguous()
    return x.data_ptr()


def single(x: Tensor) -> int:
    """The address of float32 numbers."""
    assert x.dtype == torch.float32
    return at(x)


def same(x: Tensor, other: Tensor) -> int:
    """The address of numbers of another tensor's type."""
    assert x.dtype == other.dtype
    return at(x)


def norm(
    x: Tensor, added: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """An RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) of a sum.

    Args:
        x: [T, D] float32.
        added: [T, D] of `dtype`; None for nothing.
        weight: [D]; None for ones.
        eps: of the norm.
        dtype: of the result.

    Returns:
        [T, D] the sum, [T, D] it normed, [T, 1] 1/RMS.
    """
    tokens, width = x.shape
    middle = x if added is None else torch.empty_like(x)
    normed, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(tokens, 1)
    library().norm(
        *(single(x), None if added is None else same(added, normed), None if weight is None else single(weight), eps),
        *(at(middle), at(normed), at(inverse), tokens, width, half(normed), torch.get_num_threads()),
    )
    return middle, normed, inverse


def norm_backward(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, passing: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[T, D] the gradient of the sum plus `passing`, that of the residual stream; and [D] that of the weight."""
    tokens, width = x.shape
    of_x, of_weight = torch.empty_like(x), x.new_empty(PARTS, width)
    library().norm_backward(
        *(at(grad), single(x), single(inverse), single(weight), None if passing is None else single(passing)),
        *(at(of_x), at(of_weight), PARTS, tokens, width, half(grad), torch.get_num_threads()),
    )
    return of_x, of_weight.sum(0)


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, F] SiLU(gate) · up (Shazeer 2020, arXiv:2002.05202), of [T, 2F] both."""
    tokens, both = gate_up.shape
    inner = gate_up.new_empty(tokens, both // 2)
    library().swiglu(at(gate_up), at(inner), tokens, both // 2, half(gate_up), torch.get_num_threads())
    return inner


def swiglu_backward(gate_up: Tensor, of_inner: Tensor) -> tuple[Tensor, Tensor]:
    """[T, 2F] the gradient of gate and up, and [T, F] the result once more."""
    of_gate_up, inner = torch.empty_like(gate_up), torch.empty_like(of_inner)
    library().swiglu_backward(
        *(at(gate_up), same(of_inner, gate_up), at(of_gate_up), at(inner), *of_inner.shape),
        *(half(gate_up), torch.get_num_threads()),
    )
    return of_gate_up, inner


def add(x: Tensor, added: Tensor) -> Tensor:
    """[T, D] float32 x + added."""
    found = torch.empty_like(x)
    library().add(single(x), at(added), at(found), x.numel(), half(added), torch.get_num_threads())
    return found


class _LogProbability(torch.autograd.Function):
    """[N] the log-probability of each target under logits [N, V] times `scale`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, scale: float) -> Tensor:
        """Logits may be the first columns of wider rows."""
        rows, vocabulary = logits.shape
        assert logits.stride(1) == 1
        assert len(target) == rows
        assert target.dtype == torch.int64
        logp, total = (logits.new_empty(rows, dtype=torch.float32) for _ in "lt")
        library().cross_entropy(
            *(logits.data_ptr(), logits.stride(0), at(target), scale, at(logp), at(total), rows, vocabulary),
            *(half(logits), torch.get_num_threads()),
        )
        ctx.save_for_backward(logits, target, total)
        ctx.scale = scale
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of the logits, in their place: they are the largest tensor of an update."""
        logits, target, total = ctx.saved_tensors
        rows, vocabulary = logits.shape
        of_logits = logits.detach() if logits.is_contiguous() else logits.new_empty(rows, vocabulary)
        increment_version(logits)  # so that autograd refuses to go on where anything needs them once more
        grad = grad.contiguous()
        library().cross_entropy_backward(
            *(logits.data_ptr(), logits.stride(0), at(target), ctx.scale, at(total), single(grad)),
            *(at(of_logits), rows, vocabulary, half(logits), torch.get_num_threads()),
        )
        return of_logits, None, None


def log_probability(logits: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """[N] the log-probability of each target; the backward pass, of which there may be one, writes over the logits.

    Args:
        logits: [N, V], rows of which may be the beginnings of wider ones.
        target: [N].
        scale: logits are multiplied by it: 1 / temperature.

    Raises:
        IndexError: a target is no column of the logits.
    """
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
        raise IndexError(f"targets from {int(target.min())} to {int(target.max())}, of {logits.shape[1]} columns")
    found: Tensor = _LogProbability.apply(logits, target, scale)  # type: ignore[no-untyped-call]
    return found


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
    assert len(uniform) == rows
    token, logp = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    uniform = uniform.contiguous()
    library().sample(
        *(logits.data_ptr(), logits.stride(0), at(uniform), scale, at(token), at(logp)),
        *(rows, vocabulary, half(logits), torch.get_num_threads()),
    )
    return token, logp
