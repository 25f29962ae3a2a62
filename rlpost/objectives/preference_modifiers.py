"""Modifiers of pairs, applied before any pair loss: another divergence, length desensitisation, confidence weights.

Each modifier takes pairs and returns pairs, so it composes with every loss. Divergences and lengths change Δ, which
losses without a reference (`simpo`, `cpo`, `orpo`) do not use. Below them: mixing of policy and reference weights.

Axes: P pairs, 2 = (chosen, rejected), N action tokens; of a low-rank adapter, r its rank.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.kl import LIMIT
from rlpost.objectives.preference import PairBatch, beyond_shorter
from rlpost.objectives.ragged import Ragged, widen


def f_divergence(
    pairs: PairBatch,
    *,
    kind: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl",
    alpha: float = 0.5,
) -> PairBatch:
    """Pairs with f′(e^Δ) in the place of Δ: another divergence than reverse KL (Wang et al. 2023, arXiv:2309.16240).

    `reverse_kl`: Δ; `forward_kl`: 1 − e^{−Δ}; `jensen_shannon`: log(2e^Δ/(1 + e^Δ)); `alpha`: (1 − e^{−αΔ})/α, which is
    reverse KL for α → 0 and forward KL for α = 1. f is free up to c·(u − 1), which changes f′ by c: we take f′(1) = 0,
    so that a policy at its reference has 0 also in losses that look at one side alone; margins, and so the paper's
    loss, do not depend on c. Δ is held above −20 where it is exponentiated.

    Raises:
        ValueError: for another kind, or α outside (0, 1].
    """
    delta_P2 = pairs.delta_P2
    if kind == "reverse_kl":
        ratio_P2 = delta_P2
    elif kind == "forward_kl":
        ratio_P2 = _alpha(delta_P2, 1.0)
    elif kind == "jensen_shannon":
        ratio_P2 = F.logsigmoid(delta_P2) + math.log(2)
    elif kind == "alpha":
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha lies between reverse KL (towards 0) and forward KL (1), got {alpha}")
        ratio_P2 = _alpha(delta_P2, alpha)
    else:
        raise ValueError(f"kind={kind!r}: a divergence is reverse_kl, forward_kl, jensen_shannon or alpha")
    return replace(pairs, ratio_P2=ratio_P2)


declare(f_divergence, changes_log_ratios=True, needs_collision=False)


def _alpha(delta_P2: Tensor, alpha: float) -> Tensor:
    return (-alpha * delta_P2.clamp(min=-LIMIT)).expm1() / -alpha


def length_desensitised(pairs: PairBatch, *, alpha: float = 0.5) -> PairBatch:
    """Pairs in whose Δ an action beyond the shorter one's length counts α (LD-DPO, Liu et al. 2024, arXiv:2409.06411).

    So a completion is not better for being longer. The reference is weighed like the policy, so that Δ is 0 where they
    agree; lengths stay, where a loss divides by them. α = 1 changes nothing, α = 0 cuts the excess off.

    Raises:
        ValueError: if α is not in [0, 1], the pairs do not know what lies beyond, or it stands after `f_divergence`.
    """
    _check_share(alpha)
    if pairs.excess_P2 is None:
        raise ValueError("these pairs do not say what lies beyond the shorter completion: make them with pairs_of")
    if pairs.ratio_P2 is not None:
        raise ValueError("length_desensitised weighs actions: put it before f_divergence, and only once")
    return replace(pairs, ratio_P2=pairs.delta_P2 - (1 - alpha) * pairs.excess_P2)


declare(length_desensitised, changes_log_ratios=True, weighs_actions=True, needs_collision=False)


def length_multipliers(rows: Ragged, alpha: float) -> Tensor:
    """[N] the factor of `length_desensitised` on each action: 1, and α beyond the shorter completion's length."""
    _check_share(alpha)
    return torch.ones(rows.actions, dtype=torch.float64, device=rows.device).masked_fill(beyond_shorter(rows), alpha)


def _check_share(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is what an action beyond the shorter one's length counts, in [0, 1], got {alpha}")


def confidence(pairs: PairBatch) -> PairBatch:
    """Pairs weighed by how likely the policy itself is to say both, detached (WPO, Zhou et al. 2024, arXiv:2406.11827).

    w = exp(mean logp_w + mean logp_l): the length-normalised probabilities, plain. Where the pairs know the chance
    that two draws agree (`collision_N` of `pairs_of`), the paper's sampled alignment: every action's π(y) is divided by
    Σ_v π(v)², its mean over draws, so that a sample of the policy itself weighs about 1; w is at most 1, which the
    paper's formula leaves open.
    """
    logp_P2 = pairs.logp_P2 if pairs.collision_P2 is None else pairs.logp_P2 - pairs.collision_P2
    weight_P = (logp_P2 / pairs.length_P2.clamp(min=1)).detach().sum(1).clamp(max=0).exp()
    return replace(pairs, weight_P=weight_P if pairs.weight_P is None else pairs.weight_P * weight_P)


declare(confidence, needs_collision=True)


def mix(policy: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """α·π + (1 − α)·ref: the weights of the next reference (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""
    return alpha * widen(policy) + (1 - alpha) * widen(reference)


def mix_lora(
    a_policy: Tensor, b_policy: Tensor, a_reference: Tensor, b_reference: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """(A [r + r′, in], B [out, r + r′]) with B·A = α·B_p·A_p + (1 − α)·B_r·A_r: `mix` of low-rank adapters, exactly.

    The model uses the product, and mixing the factors instead would add cross terms. Stacking the factors along the
    rank keeps the products apart.

    Args:
        a_policy: [r, in].
        b_policy: [out, r].
        a_reference: [r′, in], of the same scale as the policy's: the result keeps it, though its rank has grown.
        b_reference: [out, r′].
        alpha: the policy's share.
    """
    a = torch.cat([widen(a_policy), widen(a_reference)])
    return a, torch.cat([alpha * widen(b_policy), (1 - alpha) * widen(b_reference)], 1)


def recompressed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A′ [rank, in], B′ [out, rank], ‖B·A − B′·A′‖/‖B·A‖), the product nearest to B·A (Eckart & Young 1936).

    Stacking adds ranks with every refresh. The singular values are those of the small core between the two factors'
    orthonormal bases; each factor gets their roots. A rank beyond the product's own is filled up with zeros.
    """
    basis_out, core_out = torch.linalg.qr(widen(b))
    basis_in, core_in = torch.linalg.qr(widen(a).T)
    u, s, v = torch.linalg.svd(core_out @ core_in.T, full_matrices=False)
    norm = float(s.norm())
    kept = s[:rank]
    missing = rank - len(kept)
    a_new = kept.sqrt()[:, None] * (v[:rank] @ basis_in.T)
    b_new = (basis_out @ u[:, :rank]) * kept.sqrt()
    error = float(s[rank:].norm()) / norm if norm > 0 else 0.0
    return F.pad(a_new, (0, 0, 0, missing)), F.pad(b_new, (0, missing)), error
