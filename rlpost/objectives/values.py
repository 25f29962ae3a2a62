"""The critic's loss. Axes: N action tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives.rows import widen


def value_loss(value_N: Tensor, return_N: Tensor, old_value_N: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """[N] ½·max((V − R)², (clip(V, V_old ± ε) − R)²), or ½(V − R)² without a clip.

    The clip is that of PPO's first implementation: a value that has moved further than ε from the one it had when
    the samples were taken gets no gradient, unless it moved the wrong way.
    """
    value_N, return_N = widen(value_N), widen(return_N)
    square_N = (value_N - return_N).square()
    if clip is None:
        return 0.5 * square_N
    near_N = widen(old_value_N) + (value_N - widen(old_value_N)).clamp(-clip, clip)
    return 0.5 * torch.maximum(square_N, (near_N - return_N).square())
