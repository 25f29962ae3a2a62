"""Learning by comparison with another policy: who is preferred, whom one meets, and what exploration costs.

Axes: P prompts, G completions of the policy and O of the other one to a prompt, N action tokens, B rows, V vocabulary.
NaN marks a completion that has no reward: it is compared with none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlpost.objectives.ragged import widen


def preferred(
    reward_PG: Tensor,
    other_PO: Tensor,
    *,
    preference: Literal["bradley_terry", "step"] = "bradley_terry",
    scale: float = 1.0,
) -> Tensor:
    """[P, G] the mean over the other policy's completions of P(y ≻ y'), the reward of Nash-MD-PG (arXiv:2312.00886).

    P is σ((r − r')/scale) (`bradley_terry`), or 1 for the better one and ½ for each of equals (`step`).

    Raises:
        ValueError: for another `preference`, or a scale that is not positive.
    """
    if preference not in ("bradley_terry", "step"):
        raise ValueError(f"preference={preference!r}: rewards are compared by `bradley_terry` or by `step`")
    if scale <= 0:
        raise ValueError(f"scale={scale}: the scale of differences of rewards must be positive")
    gap_PGO = widen(reward_PG)[:, :, None] - widen(other_PO)[:, None, :]
    # The sign of no number is 0, and a missing reward is no tie.
    step_PGO = torch.where(gap_PGO.isnan(), gap_PGO, (gap_PGO.sign() + 1) / 2)
    won_PGO = torch.sigmoid(gap_PGO / scale) if preference == "bradley_terry" else step_PGO
    return won_PGO.nanmean(2)


def exploration(logp_N: Tensor, met_N: Tensor) -> Tensor:
    """[N] logp where the other policy acted, else 0: XPO adds α times its sum over a pair to the pair's loss.

    Exploratory preference optimisation, arXiv:2405.21046, algorithm 1. The rewards β·log(π/π_ref) that a policy implies
    are known but for a constant; where that holds their mean under the other policy, the value of the best policy is
    −β·E[log(π/π_ref)] under it. Less log π there is therefore optimism: the policy moves to what it was not shown.
    """
    return torch.where(met_N, widen(logp_N), 0.0)


def towards_reference(logits_BV: Tensor, reference_BV: Tensor, *, share: float) -> Tensor:
    """[B, V] what makes the logits those of π^(1 − share)·π_ref^share in each state: whom Nash-MD-PG meets.

    Each state is normalised by itself as its token is drawn (arXiv:2312.00886), so completions are near the geometric
    mixture of whole ones, and not it; at a share of 1 they are the reference's own.

    Raises:
        ValueError: if the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: the reference's share of a mixture is from 0 to 1")
    return share * (widen(reference_BV) - widen(logits_BV))
