"""How much an expert's rows weigh beside a policy's own samples."""

from __future__ import annotations

import math


def expert_weight(
    step: int, *, peak: float, valley: float | None = None, warmup_steps: int = 0, decay_steps: int = 0
) -> float:
    """μ in L = (1 − μ)·L_own + μ·L_expert: rises along a line to its peak, then falls along a cosine to its valley.

    μ(t) = peak·t/W for t < W; then valley + (peak − valley)·(1 + cos(π(t − W)/D))/2 for t < W + D; then valley.
    CHORD (Zhang et al. 2025, arXiv:2508.11408), which goes from imitation to exploration so.

    Args:
        step: t, counted from 0.
        peak: the largest μ.
        valley: the last μ; by default the peak, so that μ is constant after the rise.
        warmup_steps: W, steps of the rise, of which the first has μ = 0.
        decay_steps: D, steps of the fall.

    Raises:
        ValueError: `peak` and `valley` are not 0 ≤ valley ≤ peak ≤ 1, or a number of steps is negative.
    """
    least = peak if valley is None else valley
    if not 0 <= least <= peak <= 1:
        raise ValueError(f"peak={peak}, valley={least}: an expert's weight falls from at most 1 to at least 0")
    if warmup_steps < 0 or decay_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}, decay_steps={decay_steps}: a number of steps is 0 or more")
    if step < warmup_steps:
        return peak * step / warmup_steps
    fallen = step - warmup_steps
    if fallen >= decay_steps:
        return least
    return least + (peak - least) * 0.5 * (1.0 + math.cos(math.pi * fallen / decay_steps))
