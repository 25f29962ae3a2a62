"""Supervised losses per action. Axes: N action tokens."""

from __future__ import annotations

from torch import Tensor

from rlpost.objectives.rows import widen


def nll(logp_N: Tensor) -> Tensor:
    """[N] −logp: maximum likelihood."""
    return -widen(logp_N)


def dynamic_fine_tuning(logp_N: Tensor) -> Tensor:
    """[N] −p.detach()·logp: the token's own probability as weight (DFT, Wu et al. 2025, arXiv:2508.05629, eq. 9)."""
    return -widen(logp_N).detach().exp() * logp_N
