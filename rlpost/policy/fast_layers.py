"""Layers whose arithmetic is a transformers model's own, in faster kernels; every family and its adapters gain by them.

On a CPU, PyTorch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's;
oneDNN, which is part of PyTorch too, uses it everywhere. So on a processor with AVX-512 linear layers call oneDNN
forward and for the gradient of their input; the gradient of the weight, whose long axis is summed over, is as fast in
MKL. On others MKL is the faster one.

Axes: T rows (all leading axes), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN and the operation used here, and the CPU runs it in that type."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    known = dtype == torch.float32
    return known or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def prefers_onednn() -> bool:
    """Whether it multiplies float32 matrices, as they are, faster than PyTorch does by itself."""
    return has_onednn(torch.float32) and "AVX512" in torch.backends.cpu.get_cpu_capability()


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[T, O] xWᵀ + b in oneDNN on a CPU, of a weight as it is or packed for it."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return found


class _Product(torch.autograd.Function):
    """xWᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """[T, O]."""
        ctx.save_for_backward(x_TI, weight_OI)
        return product(x_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, W and b, as far as they are wanted."""
        x_TI, weight_OI = ctx.saved_tensors
        x, weight, bias = ctx.needs_input_grad
        return (
            product(grad_TO, weight_OI.t()) if x else None,
            grad_TO.t() @ x_TI if weight else None,
            grad_TO.sum(0) if bias else None,
        )


class FastLinear(nn.Linear):
    """A linear layer that calls oneDNN where its input is float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """[…, O] from […, I]."""
        weight = self.weight
        plain = input.dtype == weight.dtype == torch.float32 and input.device.type == weight.device.type == "cpu"
        if not plain or not input.numel() or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, self.bias)
        rows = input.reshape(-1, input.shape[-1])
        if torch.is_grad_enabled():
            found: Tensor = _Product.apply(rows, weight, self.bias)  # type: ignore[no-untyped-call]
        else:
            found = product(rows, weight, self.bias)
        return found.view(*input.shape[:-1], -1)


def use_fast_linear(model: nn.Module) -> None:
    """Let every plain linear layer of a model call oneDNN; weights, names and checkpoints stay as they are.

    To be called before there are adapters: one that is added later must compute as those that were there.
    """
    if not prefers_onednn():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
