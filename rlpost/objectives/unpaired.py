"""Losses on completions that are each desirable or not. Axes: U completions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unpaired:
    """Log-ratios Δ = Σ over actions of (logp − ref)."""

    delta_U: Tensor
    """[U] with gradient."""
    mismatched: Tensor
    """Any number of log-ratios of mismatched pairs, a prompt with another's completion: those of the whole update."""
    desirable_U: Tensor
    """[U] bool."""


def kto(unpaired: Unpaired, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    """[U] w_d·(1 − σ(β(Δ − z))) where desirable, w_u·(1 − σ(β(z − Δ))) where not (KTO, arXiv:2402.01306, eq. 8).

    z = max(0, mean log-ratio of mismatched pairs), detached: a biased estimate of the policy's divergence from the
    reference, which the paper prefers to sampling.
    """
    z = unpaired.mismatched.detach().mean().clamp(min=0) if len(unpaired.mismatched) else 0.0
    surplus_U = beta * (unpaired.delta_U - z)
    good_U = desirable * (1 - surplus_U.sigmoid())
    return torch.where(unpaired.desirable_U, good_U, undesirable * (1 - (-surplus_U).sigmoid()))
