"""Losses on preference pairs, one value a pair.

Axes: P pairs, 2 = (chosen, rejected). With Δ = Σ over actions of (logp − ref), Δ_w of the chosen and Δ_l of the
rejected completion, h = Δ_w − Δ_l.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rlpost.objectives.rows import Rows


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of P pairs, summed over each completion's actions."""

    logp_P2: Tensor
    """[P, 2] under the policy, with gradient."""
    reference_P2: Tensor
    """[P, 2] under the reference."""
    length_P2: Tensor
    """[P, 2] number of actions."""

    @property
    def delta_P2(self) -> Tensor:
        """[P, 2] Δ_w and Δ_l."""
        return self.logp_P2 - self.reference_P2

    @property
    def margin_P(self) -> Tensor:
        """[P] h = Δ_w − Δ_l; positive where the policy prefers the chosen one more than the reference does."""
        return self.delta_P2[:, 0] - self.delta_P2[:, 1]

    @property
    def mean_logp_P2(self) -> Tensor:
        """[P, 2] log-probability per action, 0 for a completion without actions."""
        return self.logp_P2 / self.length_P2.clamp(min=1)

    @property
    def mean_delta_P2(self) -> Tensor:
        """[P, 2] Δ per action."""
        return self.delta_P2 / self.length_P2.clamp(min=1)


def pairs_of(logp_N: Tensor, reference_N: Tensor, rows: Rows) -> Pairs:
    """Pairs from per-action log-probabilities; completions lie chosen, rejected, chosen, rejected, …

    Raises:
        ValueError: if the number of completions is odd.
    """
    if rows.completions % 2:
        raise ValueError(f"{rows.completions} completions are not pairs of chosen and rejected")
    logp_P2 = rows.sum(logp_N).view(-1, 2)
    return Pairs(logp_P2, rows.sum(reference_N).view(-1, 2), rows.lengths_S.view(-1, 2).to(logp_P2.dtype))


def dpo(pairs: Pairs, *, beta: float = 0.1, epsilon: float = 0.0) -> Tensor:
    """[P] −(1−ε)·logσ(βh) − ε·logσ(−βh) (DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With ε > 0, the probability that a label is flipped: conservative DPO (Mitchell 2023).
    """
    logit_P = beta * pairs.margin_P
    return -(1 - epsilon) * F.logsigmoid(logit_P) - epsilon * F.logsigmoid(-logit_P)


def dpo_robust(pairs: Pairs, *, beta: float = 0.1, epsilon: float = 0.1) -> Tensor:
    """[P] [−(1−ε)·logσ(βh) + ε·logσ(−βh)]/(1−2ε): unbiased under flips of rate ε (arXiv:2403.00409, eq. 12).

    Raises:
        ValueError: if ε is not in [0, ½).
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon is a flip rate in [0, 0.5), got {epsilon}")
    logit_P = beta * pairs.margin_P
    return (-(1 - epsilon) * F.logsigmoid(logit_P) + epsilon * F.logsigmoid(-logit_P)) / (1 - 2 * epsilon)


def ipo(pairs: Pairs, *, beta: float = 0.1, summed: bool = False) -> Tensor:
    """[P] (h̄ − 1/(2β))², h̄ per action or, `summed`, whole (IPO, Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
    h_P = pairs.margin_P if summed else pairs.mean_delta_P2[:, 0] - pairs.mean_delta_P2[:, 1]
    return (h_P - 1 / (2 * beta)) ** 2


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] relu(1 − βh) (SLiC, Zhao et al. 2023, arXiv:2305.10425, with DPO's implicit reward)."""
    return F.relu(1 - beta * pairs.margin_P)


def length_normalised(pairs: Pairs, *, beta: float = 5.0) -> Tensor:
    """[P] −logσ(β(Δ_w/L_w − Δ_l/L_l)) (Tülu 3, Lambert et al. 2024, arXiv:2411.15124, eq. 6)."""
    return -F.logsigmoid(beta * (pairs.mean_delta_P2[:, 0] - pairs.mean_delta_P2[:, 1]))


def simpo(pairs: Pairs, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """[P] −logσ(β(mean logp_w − mean logp_l) − γ), without a reference (SimPO, Meng et al. 2024, arXiv:2405.14734)."""
    mean_P2 = pairs.mean_logp_P2
    return -F.logsigmoid(beta * (mean_P2[:, 0] - mean_P2[:, 1]) - gamma)


def cpo(pairs: Pairs, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """[P] −logσ(β(logp_w − logp_l)) + α·NLL_w per action (CPO, Xu et al. 2024, arXiv:2401.08417, eq. 5)."""
    preference_P = -F.logsigmoid(beta * (pairs.logp_P2[:, 0] - pairs.logp_P2[:, 1]))
    return preference_P - alpha * pairs.mean_logp_P2[:, 0]
