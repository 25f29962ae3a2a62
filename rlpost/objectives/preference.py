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

from rlpost.facts import declare
from rlpost.objectives.kl import LIMIT
from rlpost.objectives.ragged import Ragged, widen
from rlpost.objectives.reward_model import plackett_luce
from rlpost.objectives.supervised import log1mexp


@dataclass(frozen=True)
class PairBatch:
    """Log-probabilities of P pairs, summed over each completion's actions."""

    logp_P2: Tensor
    """[P, 2] under the policy, with gradient."""
    reference_P2: Tensor
    """[P, 2] under the reference."""
    length_P2: Tensor
    """[P, 2] number of actions."""
    weight_P: Tensor | None = None
    """[P] factor on each pair's loss from a modifier; applied where the losses are summed."""
    ratio_P2: Tensor | None = None
    """[P, 2] Δ as changed by a modifier; losses without a reference do not use it."""
    excess_P2: Tensor | None = None
    """[P, 2] the part of Δ that comes from actions beyond the other completion's length."""
    collision_P2: Tensor | None = None
    """[P, 2] Σ over actions of log Σ_v π(v)²: the log-probability that two draws of the policy agree."""

    @property
    def delta_P2(self) -> Tensor:
        """[P, 2] Δ_w and Δ_l, as changed by modifiers."""
        return self.logp_P2 - self.reference_P2 if self.ratio_P2 is None else self.ratio_P2

    @property
    def table_PC(self) -> Tensor:
        """[P, C] all fields before modifiers, as columns, to be gathered over a whole update."""
        assert self.weight_P is None
        assert self.ratio_P2 is None
        columns = (self.logp_P2, self.reference_P2, self.length_P2, self.excess_P2, self.collision_P2)
        return torch.cat([x_P2 for x_P2 in columns if x_P2 is not None], 1)

    @staticmethod
    def from_table(table_PC: Tensor) -> PairBatch:
        """The pairs of a `table_PC`."""
        logp_P2, reference_P2, length_P2, excess_P2, *collision_P2 = torch.split(table_PC, 2, 1)
        return PairBatch(
            logp_P2,
            reference_P2,
            length_P2,
            excess_P2=excess_P2,
            collision_P2=collision_P2[0] if collision_P2 else None,
        )

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


def pairs_of(logp_N: Tensor, reference_N: Tensor, rows: Ragged, collision_N: Tensor | None = None) -> PairBatch:
    """Pairs from per-action log-probabilities; completions lie chosen, rejected, chosen, rejected, …

    Args:
        logp_N: under the policy, with gradient.
        reference_N: under the reference.
        rows: which action belongs to which completion.
        collision_N: log Σ_v π(v)² in the state before each action, which the modifier `confidence` can use.

    Raises:
        ValueError: if the number of completions is odd.
    """
    if rows.completions % 2:
        raise ValueError(f"{rows.completions} completions are not pairs of chosen and rejected")
    logp_P2 = rows.sum(logp_N).view(-1, 2)
    excess_N = beyond_shorter(rows) * (widen(logp_N) - widen(reference_N))
    return PairBatch(
        logp_P2,
        rows.sum(reference_N).view(-1, 2),
        rows.lengths_S.view(-1, 2).to(logp_P2.dtype),
        excess_P2=rows.sum(excess_N).view(-1, 2),
        collision_P2=None if collision_N is None else rows.sum(collision_N).view(-1, 2),
    )


def beyond_shorter(rows: Ragged) -> Tensor:
    """[N] bool: the action lies beyond the length of its pair's shorter completion."""
    shorter_S = rows.lengths_S.view(-1, 2).amin(1).repeat_interleave(2)
    place_N = torch.arange(rows.actions, device=rows.device) - rows.spread(rows.start_S)
    return place_N >= rows.spread(shorter_S)


def dpo(pairs: PairBatch, *, beta: float = 0.1, epsilon: float = 0.0) -> Tensor:
    """[P] −(1−ε)·logσ(βh) − ε·logσ(−βh) (DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    With ε > 0, the probability that a label is flipped: conservative DPO (Mitchell 2023).
    """
    logit_P = beta * pairs.margin_P
    return -(1 - epsilon) * F.logsigmoid(logit_P) - epsilon * F.logsigmoid(-logit_P)


declare(dpo, couples_pairs=False)


def dpo_robust(pairs: PairBatch, *, beta: float = 0.1, epsilon: float = 0.1) -> Tensor:
    """[P] [−(1−ε)·logσ(βh) + ε·logσ(−βh)]/(1−2ε): unbiased under flips of rate ε (arXiv:2403.00409, eq. 12).

    Raises:
        ValueError: if ε is not in [0, ½).
    """
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"epsilon is a flip rate in [0, 0.5), got {epsilon}")
    logit_P = beta * pairs.margin_P
    return (-(1 - epsilon) * F.logsigmoid(logit_P) + epsilon * F.logsigmoid(-logit_P)) / (1 - 2 * epsilon)


declare(dpo_robust, couples_pairs=False)


def ipo(pairs: PairBatch, *, beta: float = 0.1, summed: bool = False) -> Tensor:
    """[P] (h̄ − 1/(2β))², h̄ per action or, `summed`, whole (IPO, Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
    h_P = pairs.margin_P if summed else pairs.mean_delta_P2[:, 0] - pairs.mean_delta_P2[:, 1]
    return (h_P - 1 / (2 * beta)) ** 2


declare(ipo, couples_pairs=False)


def hinge(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] relu(1 − βh) (SLiC, Zhao et al. 2023, arXiv:2305.10425, with DPO's implicit reward)."""
    return F.relu(1 - beta * pairs.margin_P)


declare(hinge, couples_pairs=False)


def length_normalised(pairs: PairBatch, *, beta: float = 5.0) -> Tensor:
    """[P] −logσ(β(Δ_w/L_w − Δ_l/L_l)) (Tülu 3, Lambert et al. 2024, arXiv:2411.15124, eq. 6)."""
    return -F.logsigmoid(beta * (pairs.mean_delta_P2[:, 0] - pairs.mean_delta_P2[:, 1]))


declare(length_normalised, couples_pairs=False)


def simpo(pairs: PairBatch, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """[P] −logσ(β(mean logp_w − mean logp_l) − γ), without a reference (SimPO, Meng et al. 2024, arXiv:2405.14734)."""
    mean_P2 = pairs.mean_logp_P2
    return -F.logsigmoid(beta * (mean_P2[:, 0] - mean_P2[:, 1]) - gamma)


declare(simpo, couples_pairs=False, needs_reference=False)


def alphapo(pairs: PairBatch, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Tensor:
    """[P] −logσ(r_w − r_l − γ), r = β(1 − p^{−α})/α, p = e^{mean logp} (AlphaPO, Gupta et al. 2025, arXiv:2501.03884).

    α bends SimPO's reward: dr/d(mean logp) = β·p^{−α}, so with α > 0 unlikely completions are moved more than likely
    ones, with α < 0 less. α = 0 is `simpo`, the limit from both sides; α = −1 is linear in p. −α·mean logp is held
    below 20, where r is 10⁸ and more.

    Raises:
        ValueError: if α is not finite.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha bends the reward and is a finite number, got {alpha}")
    mean_P2 = pairs.mean_logp_P2
    shaped_P2 = torch.expm1((-alpha * mean_P2).clamp(max=LIMIT)) / -alpha if alpha else mean_P2
    return -F.logsigmoid(beta * (shaped_P2[:, 0] - shaped_P2[:, 1]) - gamma)


declare(alphapo, couples_pairs=False, needs_reference=False)


def cpo(pairs: PairBatch, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """[P] −logσ(β(logp_w − logp_l)) + α·NLL_w per action (CPO, Xu et al. 2024, arXiv:2401.08417, eq. 5)."""
    preference_P = -F.logsigmoid(beta * (pairs.logp_P2[:, 0] - pairs.logp_P2[:, 1]))
    return preference_P - alpha * pairs.mean_logp_P2[:, 0]


declare(cpo, couples_pairs=False, needs_reference=False)


def exo(pairs: PairBatch, *, beta: float = 0.1, epsilon: float = 1e-3) -> Tensor:
    """[P] KL(softmax(βΔ_w, βΔ_l) || [1−ε, ε]) (EXO on pairs, Ji et al. 2024, arXiv:2402.00856, eq. 16).

    Raises:
        ValueError: if ε is not in [1e-3, ½): at 0 the divergence is infinite.
    """
    if not 1e-3 <= epsilon < 0.5:
        raise ValueError(f"epsilon smooths the labels, from 1e-3 to 0.5 (exclusive), got {epsilon}")
    logit_P = beta * pairs.margin_P
    chosen_P, rejected_P = F.logsigmoid(logit_P), F.logsigmoid(-logit_P)
    return chosen_P.exp() * (chosen_P - math.log1p(-epsilon)) + rejected_P.exp() * (rejected_P - math.log(epsilon))


declare(exo, couples_pairs=False)


def nca(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] −logσ(βΔ_w) − ½logσ(−βΔ_w) − ½logσ(−βΔ_l) (NCA on pairs, Chen et al. 2024, arXiv:2402.05369)."""
    chosen_P, rejected_P = (beta * pairs.delta_P2).unbind(1)
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


declare(nca, couples_pairs=False)


def bco(pairs: PairBatch, *, beta: float = 0.1, delta: float | None = None) -> Tensor:
    """[P] −logσ(βΔ_w − δ) − logσ(−(βΔ_l − δ)) (BCO, Jung et al. 2024, arXiv:2404.04656).

    δ is given, or the mean of βΔ over both sides of all these pairs, without gradient. The paper's is a running mean
    over updates; an update's own needs no state.
    """
    reward_P2 = beta * pairs.delta_P2
    shift = reward_P2.detach().sum() / max(reward_P2.numel(), 1) if delta is None else delta
    return -F.logsigmoid(reward_P2[:, 0] - shift) - F.logsigmoid(shift - reward_P2[:, 1])


def sppo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] (Δ_w − 1/(2β))² + (Δ_l + 1/(2β))² (SPPO, Wu et al. 2024, arXiv:2405.00675, eq. 4.7; β = 1/η).

    The paper estimates how probable it is that the chosen one wins; here it is 1.
    """
    chosen_P, rejected_P = pairs.delta_P2.unbind(1)
    return (chosen_P - 1 / (2 * beta)).square() + (rejected_P + 1 / (2 * beta)).square()


declare(sppo, couples_pairs=False)


def aot(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] −logσ(β(policy margin − reference margin of the same rank)) (AOT paired, arXiv:2406.05882).

    A margin is logp_w − logp_l. The policy's margins should dominate the reference's as a distribution, not pair by
    pair: each is compared with the one of its rank. Element i of the result belongs to the pair of policy margin i.
    """
    reference_P = pairs.reference_P2[:, 0] - pairs.reference_P2[:, 1]
    policy_P = pairs.margin_P + reference_P
    return -F.logsigmoid(beta * (policy_P - _of_same_rank(policy_P, reference_P)))


def aot_unpaired(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] −logσ(β(Δ_w − Δ_l of the same rank)) (AOT unpaired, Melnyk et al. 2024, arXiv:2406.05882).

    Which completions form a pair does not matter. Element i of the result belongs to the pair of chosen completion i.
    """
    chosen_P, rejected_P = pairs.delta_P2.unbind(1)
    return -F.logsigmoid(beta * (chosen_P - _of_same_rank(chosen_P, rejected_P)))


def _of_same_rank(x_P: Tensor, other_P: Tensor) -> Tensor:
    """[P] for every element of `x_P`, the one of `other_P` that has its rank there."""
    return other_P.sort().values[x_P.argsort(stable=True).argsort()]


def apo_zero(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] 1 − σ(βΔ_w) + σ(βΔ_l): the chosen one up, the rejected one down (APO-zero, arXiv:2408.06266)."""
    chosen_P, rejected_P = (beta * pairs.delta_P2).unbind(1)
    return 1 - chosen_P.sigmoid() + rejected_P.sigmoid()


declare(apo_zero, couples_pairs=False)


def apo_down(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] σ(βΔ_w) + 1 − σ(βh): both down, the rejected one more (APO-down, arXiv:2408.06266)."""
    return (beta * pairs.delta_P2[:, 0]).sigmoid() + 1 - (beta * pairs.margin_P).sigmoid()


declare(apo_down, couples_pairs=False)


def discopop(pairs: PairBatch, *, beta: float = 0.1, temperature: float = 0.05) -> Tensor:
    """[P] (1−s)·(−logσ(βh)) + s·e^{−βh}, s = σ(βh/τ), τ = `temperature` (DiscoPOP, arXiv:2406.08414)."""
    logit_P = beta * pairs.margin_P
    # Both factors in one exponent: separately, an extreme pair would be 0·∞.
    exponential_P = (F.logsigmoid(logit_P / temperature) - logit_P).clamp(max=LIMIT).exp()
    return (-logit_P / temperature).sigmoid() * -F.logsigmoid(logit_P) + exponential_P


declare(discopop, couples_pairs=False)


def orpo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """[P] NLL_w − β·logσ(log-odds_w − log-odds_l), by mean logp (ORPO, Hong et al. 2024, arXiv:2403.07691, eq. 6).

    log-odds = logp − log(1 − p), p the geometric mean of a completion's probabilities. No reference.
    """
    # A completion without actions has mean 0, certainty, whose odds are infinite: one bit below has them large.
    mean_P2 = pairs.mean_logp_P2.clamp(max=-torch.finfo(pairs.logp_P2.dtype).eps)
    odds_P2 = mean_P2 - log1mexp(mean_P2)
    return -pairs.mean_logp_P2[:, 0] - beta * F.logsigmoid(odds_P2[:, 0] - odds_P2[:, 1])


declare(orpo, couples_pairs=False, needs_reference=False)


def dpo_plackett_luce(delta_PK: Tensor, reward_PK: Tensor, *, beta: float = 0.1) -> Tensor:
    """[P] Plackett–Luce of βΔ over whole groups, by reward (Rafailov et al. 2023, arXiv:2305.18290, appendix A.3).

    See `plackett_luce` for equal and missing rewards. With two completions it is `dpo`.
    """
    return plackett_luce(beta * delta_PK, reward_PK)
