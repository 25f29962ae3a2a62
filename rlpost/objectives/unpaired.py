"""Losses on single completions, each desirable or not.

Axes: U completions. Δ = Σ over actions of (logp − ref).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.objectives.ragged import widen


@dataclass(frozen=True)
class Unpaired:
    """Log-ratios of U labelled completions, and of mismatched ones.

    Example: two prompts, of which the first got a good completion and the second a bad one:
    ``Unpaired(tensor([0.5, -1.0]), tensor([-0.2, 0.6]), tensor([True, False]))``; z is then 0.2.
    """

    delta_U: Tensor
    """[U] Δ with gradient."""
    mismatched_delta_U: Tensor
    """Δ of every prompt with the completion of another one, for the whole update where `delta_U` is a part of it."""
    desirable_U: Tensor
    """[U] bool."""

    @property
    def reference_point(self) -> Tensor:
        """z = max(0, mean Δ of the mismatched), detached: estimates the policy's divergence from the reference."""
        mismatched = widen(self.mismatched_delta_U.detach())
        return (mismatched.sum() / max(mismatched.numel(), 1)).clamp(min=0)


def kto(unpaired: Unpaired, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Tensor:
    """[U] w_d·(1 − σ(β(Δ − z))) where desirable, w_u·(1 − σ(β(z − Δ))) where not (KTO, arXiv:2402.01306, eq. 8).

    The paper's loss w − w·σ is the same. Its z is that of a micro-batch, which makes the gradient depend on how an
    update is cut; here it is that of the whole update.
    """
    surplus_U = beta * (widen(unpaired.delta_U) - unpaired.reference_point)
    good_U, bad_U = desirable * (-surplus_U).sigmoid(), undesirable * surplus_U.sigmoid()
    return torch.where(unpaired.desirable_U, good_U, bad_U)
