"""What may be done to pairs before any pair loss: another divergence, weights of confidence.

Each takes pairs and gives pairs, so that it composes with every loss. Also the mixing of a reference that follows.
Axes: P pairs, 2 = (chosen, rejected).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlpost.objectives.kl import LIMIT
from rlpost.objectives.preference import Pairs


def f_divergence(pairs: Pairs, *, kind: str = "jensen_shannon", alpha: float = 0.5) -> Pairs:
    """Pairs whose log-ratios Δ became f′(e^Δ), for another divergence than reverse KL (arXiv:2309.16240, table 1).

    `reverse_kl`: Δ + 1; `forward_kl`: −e^{−Δ}; `jensen_shannon`: log(2e^Δ/(1 + e^Δ)); `alpha`: (1 − e^{−αΔ})/α, between
    reverse (α → 0) and forward KL (α = 1). Constants fall out of the margin. Δ is clamped to ±20 before it is
    exponentiated.

    Raises:
        ValueError: for another kind, or α outside (0, 1].
    """
    delta_P2 = pairs.delta_P2.clamp(-LIMIT, LIMIT)
    if kind == "reverse_kl":
        changed_P2 = delta_P2 + 1
    elif kind == "forward_kl":
        changed_P2 = -(-delta_P2).exp()
    elif kind == "jensen_shannon":
        changed_P2 = delta_P2 - torch.nn.functional.softplus(delta_P2) + torch.log(torch.tensor(2.0)).to(delta_P2)
    elif kind == "alpha":
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha lies between reverse KL (towards 0) and forward KL (1), got {alpha}")
        changed_P2 = -(-alpha * delta_P2).expm1() / alpha
    else:
        raise ValueError(f"kind={kind!r}: reverse_kl, forward_kl, jensen_shannon or alpha")
    return replace(pairs, logp_P2=changed_P2 + pairs.reference_P2)


def confidence(pairs: Pairs) -> Pairs:
    """Pairs weighed by the policy's own mean probability of both, detached (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2).

    w = exp(mean logp_w + mean logp_l): what the policy would hardly say teaches it less. The paper's aligned variant
    divides by the sum of squared probabilities in each state, which this plain one leaves out.
    """
    weight_P = pairs.mean_logp_P2.detach().sum(1).exp()
    return replace(pairs, weight_P=weight_P if pairs.weight_P is None else pairs.weight_P * weight_P)


def mix(policy: Tensor, reference: Tensor, share: float) -> Tensor:
    """share·policy + (1 − share)·reference, the new reference (TR-DPO, arXiv:2404.09656, eq. 3)."""
    return share * policy + (1 - share) * reference


def mix_lora(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
    """(A [r + r′, in], B [out, r + r′]) with B·A = share·B_p·A_p + (1 − share)·B_r·A_r exactly.

    Products are mixed by stacking ranks. Mixing the factors is another matter: (B_p + B_r)(A_p + A_r)/4 has cross
    terms that belong to neither.

    Args:
        policy: (A [r, in], B [out, r]) of the policy's adapter.
        reference: likewise, of any rank.
        share: of the policy.
    """
    (a_p, b_p), (a_r, b_r) = policy, reference
    return torch.cat([a_p, a_r]), torch.cat([share * b_p, (1 - share) * b_r], 1)


def recompressed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A [rank, in], B [out, rank]) nearest to B·A, and the relative error ‖B·A − B′·A′‖/‖B·A‖ (Eckart–Young).

    Mixing again and again stacks ranks without end; QR of both factors keeps the singular values of the small core.
    """
    q_out, r_out = torch.linalg.qr(b)
    q_in, r_in = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_out @ r_in.T)
    root = s[:rank].sqrt()
    lost = float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt().clamp(min=torch.finfo(s.dtype).tiny))
    return root[:, None] * (v[:rank] @ q_in.T), (q_out @ u[:, :rank]) * root, lost
