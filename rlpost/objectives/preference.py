"""Losses on preference pairs, one value a pair.

Axes: P pairs, 2 = (chosen, rejected). With Δ = Σ over actions of (logp − ref), Δ_w of the chosen and Δ_l of the
rejected completion, h = Δ_w − Δ_l.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.objectives.ranking import ranking as ranked
from rlpost.objectives.rows import Rows, widen
from rlpost.objectives.supervised import log1mexp

COUPLED = frozenset({"aot", "aot_unpaired", "bco"})
"""Losses of which a pair's value depends on the other pairs: they are taken over whole updates (coupled.py)."""


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of P pairs, summed over each completion's actions."""

    logp_P2: Tensor
    """[P, 2] under the policy, with gradient."""
    reference_P2: Tensor
    """[P, 2] under the reference."""
    length_P2: Tensor
    """[P, 2] number of actions."""
    weight_P: Tensor | None = None
    """[P] factor on each pair's loss, where a modifier gave one."""

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


def pairs_of(logp_N: Tensor, reference_N: Tensor, rows: Rows, *, excess: float = 1.0) -> Pairs:
    """Pairs from per-action log-probabilities; completions lie chosen, rejected, chosen, rejected, …

    With `excess` α below 1, what the longer completion of a pair has beyond the shorter one's length counts α, in
    policy and reference (LD-DPO, Liu et al. 2024, arXiv:2409.06411, eq. 8).

    Raises:
        ValueError: if the number of completions is odd.
    """
    if rows.completions % 2:
        raise ValueError(f"{rows.completions} completions are not pairs of chosen and rejected")
    length_P2 = rows.lengths_S.view(-1, 2)
    if excess != 1.0:
        shared_N = rows.spread(length_P2.amin(1, keepdim=True).expand(-1, 2).flatten())
        place_N = torch.arange(rows.actions, device=rows.device) - rows.spread(rows.start_S)
        factor_N = torch.where(place_N < shared_N, 1.0, excess)
        logp_N, reference_N = widen(logp_N) * factor_N, widen(reference_N) * factor_N
    logp_P2 = rows.sum(logp_N).view(-1, 2)
    return Pairs(logp_P2, rows.sum(reference_N).view(-1, 2), length_P2.to(logp_P2.dtype))


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


def exo(pairs: Pairs, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """[P] KL(softmax(βΔ_w, βΔ_l) || [1−ε, ε]) (EXO on pairs, Ji et al. 2024, arXiv:2402.00856, eq. 17).

    Raises:
        ValueError: if ε is not in [1e-3, ½): at 0 the divergence is infinite.
    """
    if not 1e-3 <= epsilon < 0.5:
        raise ValueError(f"epsilon smooths the labels, from 1e-3 to 0.5 (exclusive), got {epsilon}")
    logit_P = beta * pairs.margin_P
    chosen_P, rejected_P = F.logsigmoid(logit_P), F.logsigmoid(-logit_P)
    return chosen_P.exp() * (chosen_P - math.log1p(-epsilon)) + rejected_P.exp() * (rejected_P - math.log(epsilon))


def nca(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] −logσ(βΔ_w) − ½logσ(−βΔ_w) − ½logσ(−βΔ_l) (NCA, Chen et al. 2024, arXiv:2402.05369, eq. 11)."""
    chosen_P, rejected_P = (beta * pairs.delta_P2).unbind(1)
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def bco(pairs: Pairs, *, beta: float = 0.1, threshold: float | None = None) -> Tensor:
    """[P] −logσ(βΔ_w − δ) − logσ(−(βΔ_l − δ)) (BCO, Jung et al. 2024, arXiv:2404.04656, eq. 10).

    δ is the mean of βΔ over all completions of the update, without gradient, or `threshold`. The paper's is a running
    mean over updates; an update's own mean needs no state, and is the same however the update is cut.
    """
    reward_P2 = beta * pairs.delta_P2
    delta = reward_P2.detach().mean() if threshold is None else threshold
    return -F.logsigmoid(reward_P2[:, 0] - delta) - F.logsigmoid(delta - reward_P2[:, 1])


def sppo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] (Δ_w − 1/(2β))² + (Δ_l + 1/(2β))² (SPPO, Wu et al. 2024, arXiv:2405.00675, eq. 4.6 with hard labels)."""
    chosen_P, rejected_P = pairs.delta_P2.unbind(1)
    return (chosen_P - 1 / (2 * beta)).square() + (rejected_P + 1 / (2 * beta)).square()


def aot(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] −logσ(β(sorted policy margins − sorted reference margins)) (AOT paired, Melnyk et al. 2024, arXiv:2406.05882).

    The policy's margins are to dominate the reference's as distributions, not pair by pair.
    """
    policy_P = (pairs.logp_P2[:, 0] - pairs.logp_P2[:, 1]).sort().values
    reference_P = (pairs.reference_P2[:, 0] - pairs.reference_P2[:, 1]).sort().values
    return -F.logsigmoid(beta * (policy_P - reference_P))


def aot_unpaired(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] −logσ(β(sorted Δ_w − sorted Δ_l)): who was compared with whom does not matter (AOT unpaired, ibid.)."""
    chosen_P, rejected_P = (delta.sort().values for delta in pairs.delta_P2.unbind(1))
    return -F.logsigmoid(beta * (chosen_P - rejected_P))


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] 1 − σ(βΔ_w) + σ(βΔ_l): the chosen one up, the rejected one down (APO, arXiv:2408.06266, eq. 3)."""
    chosen_P, rejected_P = (beta * pairs.delta_P2).unbind(1)
    return 1 - chosen_P.sigmoid() + rejected_P.sigmoid()


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] σ(βΔ_w) + 1 − σ(βh): both down, the rejected one more (APO, arXiv:2408.06266, eq. 4)."""
    return (beta * pairs.delta_P2[:, 0]).sigmoid() + 1 - (beta * pairs.margin_P).sigmoid()


def discopop(pairs: Pairs, *, beta: float = 0.1, temperature: float = 0.05) -> Tensor:
    """[P] (1−s)(−logσ(βh)) + s·e^{−βh}, s = σ(βh/τ) (DiscoPOP, Lu et al. 2024, arXiv:2406.08414, eq. 4)."""
    logit_P = beta * pairs.margin_P
    s_P = (logit_P / temperature).sigmoid()
    return (1 - s_P) * -F.logsigmoid(logit_P) + s_P * (-logit_P).exp()


def orpo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """[P] NLL_w − β·logσ(log-odds_w − log-odds_l), by mean logp (ORPO, Hong et al. 2024, arXiv:2403.07691, eq. 6).

    log-odds = logp − log(1 − p), p the geometric mean of a completion's probabilities. No reference.
    """
    # A completion without actions has mean 0, certainty, whose odds are infinite: one bit below has them large.
    mean_P2 = pairs.mean_logp_P2.clamp(max=-torch.finfo(pairs.logp_P2.dtype).eps)
    odds_P2 = mean_P2 - log1mexp(mean_P2)
    return -pairs.mean_logp_P2[:, 0] - beta * F.logsigmoid(odds_P2[:, 0] - odds_P2[:, 1])


def ranking(delta_PK: Tensor, reward_PK: Tensor, *, beta: float = 0.1) -> Tensor:
    """[P] the Plackett–Luce loss of βΔ over whole groups in the order of their rewards (DPO, ibid., appendix A.3).

    With two completions it is `dpo`.
    """
    return ranked(beta * delta_PK, reward_PK)
