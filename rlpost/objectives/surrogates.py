# ruff: noqa: ARG001 - every surrogate takes the same arguments, whether it needs all of them or not
"""Policy losses, per action and to be minimised; r = exp(logp − old_logp) is never negative, the advantage can be.

Axes: N action tokens. Every surrogate takes (logp_N, old_logp_N, advantage_N, rows): the current policy's
log-probabilities with gradient, those of the policy that sampled, and the advantage, both without.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.correction import off_policy_ratio
from rlpost.objectives.credit import return_to_go
from rlpost.objectives.kl import LIMIT
from rlpost.objectives.ragged import Ragged, widen
from rlpost.objectives.regression import advantage_regression
from rlpost.objectives.target_policy import target_policy

__all__ = [
    "advantage_regression",
    "clipped_share",
    "clipped_surrogate",
    "clipped_weight",
    "divergence_masked",
    "future_weighted",
    "geometric_mean",
    "policy_gradient",
    "ratio",
    "sequence_clipped",
    "sequence_soft",
    "soft_adaptive",
    "squared_log_ratio",
    "tapered",
    "target_policy",
]


def ratio(logp_N: Tensor, old_logp_N: Tensor) -> Tensor:
    """[N] exp(logp − old_logp), the log-ratio clamped to ±20."""
    return (widen(logp_N) - widen(old_logp_N)).clamp(-LIMIT, LIMIT).exp()


def policy_gradient(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, rows: Ragged, *, truncate: float | None = None
) -> Tensor:
    """[N] −A·logp (REINFORCE, Williams 1992); with `truncate` c, off-policy: weighted by the detached min(r, c)."""
    loss_N = -advantage_N * widen(logp_N)
    return loss_N if truncate is None else ratio(logp_N, old_logp_N).detach().clamp(max=truncate) * loss_N


declare(policy_gradient, vanishes_without_advantage=True)


def clipped_surrogate(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float | None = None,
    delta: float | None = None,
    off_policy_limit: float | None = None,
) -> Tensor:
    """[N] max(−A r, −A clip(r, 1−clip_low, 1+clip_high)) (PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    `dual` c bounds the loss of a negative advantage by −cA (Ye et al. 2020, arXiv:1912.09729, eq. 5); `delta`
    bounds r itself from above first. `off_policy_limit` δ leaves out actions of negative advantage in completions whose
    mean of old_logp − logp exceeds δ: what the policy would hardly say any more is not pushed away further
    (off-policy sequence masking, DeepSeek-V3.2, arXiv:2512.02556, eq. 9).
    """
    if off_policy_limit is not None:
        gone_S = rows.mean(widen(old_logp_N) - widen(logp_N.detach())) > off_policy_limit
        advantage_N = advantage_N.masked_fill((advantage_N < 0) & rows.spread(gone_S), 0.0)
    r_N, advantage_N = ratio(logp_N, old_logp_N), widen(advantage_N)
    if delta is not None:
        r_N = r_N.clamp(max=delta)
    loss_N = torch.maximum(-advantage_N * r_N, -advantage_N * r_N.clamp(1 - clip_low, 1 + clip_high))
    if dual is None:
        return loss_N
    return torch.where(advantage_N < 0, torch.minimum(loss_N, -dual * advantage_N), loss_N)


declare(clipped_surrogate, vanishes_without_advantage=True, clips_ratio=True)


def clipped_weight(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.2,
) -> Tensor:
    """[N] −clip(r, 1−clip_low, 1+clip_high).detach()·A·logp: every action keeps a gradient.

    CISPO, arXiv:2506.13585, eq. 4.
    """
    return -ratio(logp_N, old_logp_N).clamp(1 - clip_low, 1 + clip_high).detach() * advantage_N * logp_N


declare(clipped_weight, vanishes_without_advantage=True)


def sequence_clipped(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """[N] the clipped surrogate with the completion's geometric-mean ratio (GSPO-token, arXiv:2507.18071, eq. 13).

    s = exp(mean over the completion of log r); its value is one number a completion, its gradient s·∇logp.
    """
    log_s_S = rows.mean((widen(logp_N) - widen(old_logp_N)).clamp(-LIMIT, LIMIT))
    s_N = rows.spread(log_s_S.exp()).detach() * (logp_N - logp_N.detach()).exp()
    return torch.maximum(-advantage_N * s_N, -advantage_N * s_N.clamp(1 - clip_low, 1 + clip_high))


declare(sequence_clipped, vanishes_without_advantage=True)


def geometric_mean(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Tensor:
    """[N] −A·exp(mean over the completion of clipped log r), at each of its actions (GMPO, arXiv:2507.20673, eq. 4).

    log r is clipped to [−clip_low, clip_high] on the pessimistic side of each action's advantage, as in PPO's
    surrogate, and the geometric mean of the clipped ratios takes the place of the arithmetic one. One value a
    completion: weigh it with `sequence_mean`. The advantage is the completion's; where its actions differ, their mean
    counts.
    """
    log_ratio_N = (widen(logp_N) - widen(old_logp_N)).clamp(-LIMIT, LIMIT)
    clipped_N = log_ratio_N.clamp(-clip_low, clip_high)
    pessimistic_N = torch.where(
        advantage_N >= 0, torch.minimum(log_ratio_N, clipped_N), torch.maximum(log_ratio_N, clipped_N)
    )
    return rows.spread(-rows.mean(advantage_N) * rows.mean(pessimistic_N).exp())


declare(geometric_mean, vanishes_without_advantage=True, per_completion=True)


def soft_adaptive(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Tensor:
    """[N] −(4/τ)·σ(τ(r − 1))·A, τ by the advantage's sign (SAPO, arXiv:2511.20347, eq. 6): slope −A at r = 1."""
    advantage_N = widen(advantage_N)
    tau_N = torch.full_like(advantage_N, tau_negative).masked_fill(advantage_N > 0, tau_positive)
    return -(4 / tau_N) * torch.sigmoid(tau_N * (ratio(logp_N, old_logp_N) - 1)) * advantage_N


declare(soft_adaptive, vanishes_without_advantage=True)


def divergence_masked(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    threshold: float = 0.2,
    divergence: Literal["tv", "kl"] = "tv",
) -> Tensor:
    """[N] −r·A, 0 where the action has moved by more than `threshold` in its advantage's direction (DPPO).

    arXiv:2602.04879, eq. 12. How far is the divergence of two distributions that know only this action and all others:
    their total variation |p − old p|, or KL(old ‖ new) in nats (eq. 14). A ratio overstates the moves of rare tokens.

    Raises:
        ValueError: for another `divergence`.
    """
    p_N, old_p_N = widen(logp_N).detach().exp(), widen(old_logp_N).exp()
    if divergence == "tv":
        apart_N = (p_N - old_p_N).abs()
    elif divergence == "kl":
        apart_N = _binary_kl(widen(old_logp_N), widen(logp_N).detach())
    else:
        raise ValueError(f"divergence={divergence!r}: an action's probability has moved by its `tv` or its `kl`")
    onward_N = ((advantage_N > 0) & (p_N > old_p_N)) | ((advantage_N < 0) & (p_N < old_p_N))
    return torch.where(onward_N & (apart_N > threshold), 0.0, -ratio(logp_N, old_logp_N) * advantage_N)


declare(divergence_masked, vanishes_without_advantage=True)


def _binary_kl(logq_N: Tensor, logp_N: Tensor) -> Tensor:
    """[N] KL(q ‖ p) of an event and its opposite; infinite where only q leaves room for the opposite."""
    opposite_q_N, opposite_p_N = -logq_N.expm1(), -logp_N.expm1()
    other_N = torch.xlogy(opposite_q_N, opposite_q_N) - torch.xlogy(opposite_q_N, opposite_p_N)
    return logq_N.exp() * (logq_N - logp_N) + other_N


def sequence_soft(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Tensor:
    """[N] −φ(W).detach()·A·logp, φ(W) = W^k·e^{λ(1 − W)}, W the whole completion's ratio (VESPO, arXiv:2602.10693).

    k and λ go by the advantage's sign. φ is 1 at W = 1, greatest at W = k/λ, and fades both where the policy would
    hardly say the completion any more and where it says it much more often: a soft clip of W itself, which is a product
    over actions and not their mean.

    Raises:
        ValueError: if k or λ is negative: φ would have no bound.
    """
    if min(k_positive, lambda_positive, k_negative, lambda_negative) < 0:
        raise ValueError("sequence_soft: k and lambda must be 0 or more, or the weight of a completion has no bound")
    advantage_N = widen(advantage_N)
    negative_N = advantage_N < 0
    k_N = torch.full_like(advantage_N, k_positive).masked_fill(negative_N, k_negative)
    lambda_N = torch.full_like(advantage_N, lambda_positive).masked_fill(negative_N, lambda_negative)
    whole_N = off_policy_ratio(logp_N.detach(), old_logp_N, rows)
    # As one exponent: the power alone may be infinite where the product is 0.
    weight_N = (k_N * whole_N.log() + lambda_N * (1 - whole_N)).exp()
    return -weight_N * advantage_N * widen(logp_N)


declare(sequence_soft, vanishes_without_advantage=True)


def tapered(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, rows: Ragged, *, cap: float = 1.0) -> Tensor:
    """[N] −w·A·logp, without gradient to w: 1 where A ≥ 0, else min(W, cap), W the whole completion's ratio.

    TOPR, Le Roux et al. 2025, arXiv:2503.14286. Good completions count however unlikely they are by now, as in
    supervised learning; bad ones only as far as the policy would still say them, so that none is pushed away for ever.
    """
    whole_N = off_policy_ratio(logp_N.detach(), old_logp_N, rows).clamp(max=cap)
    return -torch.where(advantage_N < 0, whole_N, 1.0) * advantage_N * widen(logp_N)


declare(tapered, vanishes_without_advantage=True)


def squared_log_ratio(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, rows: Ragged, *, tau: float) -> Tensor:
    """[N] −A·logp + ½τ·Δ²/len, Δ the sum of logp − old_logp over the completion, len its actions.

    Policy mirror descent (Kimi k1.5, arXiv:2501.12599, eq. 3; arXiv:2602.05933). Summed over a completion it is
    −A·log π + ½τ·Δ², whose slope along log π is τΔ − A. With A = r − τ·log E[e^{r/τ}] that is 0 at the policy of
    greatest E[r] − τ·KL(policy ‖ sampler), whatever sampled; usual baselines put the mean reward in the place of
    τ·log E[e^{r/τ}], which is larger. No ratio is needed, so none can explode.

    Raises:
        ValueError: if τ is negative: the square would push the policy away from the sampler.
    """
    if tau < 0:
        raise ValueError(f"tau={tau}: the weight of the squared log-ratio must be 0 or more")
    apart_S = rows.sum(widen(logp_N) - widen(old_logp_N))
    square_S = apart_S.square() / rows.lengths_S.clamp(min=1)
    return -advantage_N * widen(logp_N) + 0.5 * tau * rows.spread(square_S)


def future_weighted(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    rows: Ragged,
    *,
    half_life: float = 32.0,
    influence_low: float = 0.0,
    influence_high: float = 0.2,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float = 10.0,
) -> Tensor:
    """[N] `clipped_surrogate` of the advantage f·A, f by what became of the actions that follow (FIPO).

    arXiv:2603.19835: f = clip(e^F, 1−influence_low, 1+influence_high) without gradient, F = Σ_{k≥t} γ^{k−t}·log r_k
    with γ = 2^{−1/half_life}: an action counts more where the policy has since moved towards what it led to. Actions
    with r > dual are left out of F. The authors' program also drops completions with several actions beyond `dual`;
    that rule is not here.

    Raises:
        ValueError: if `half_life` is not positive, `dual` not above 1, or `influence_low` beyond 1: f would turn A.
    """
    if half_life <= 0 or dual <= 1 or influence_low > 1:
        raise ValueError(
            f"half_life={half_life}, dual={dual}, influence_low={influence_low}: "
            "half_life must be positive, dual above 1, influence_low at most 1"
        )
    moved_N = (widen(logp_N) - widen(old_logp_N)).detach().clamp(-LIMIT, LIMIT)
    counted_N = moved_N.masked_fill(moved_N > math.log(dual), 0.0)
    future_N = return_to_go(counted_N, rows, gamma=2 ** (-1 / half_life)).clamp(-LIMIT, LIMIT)
    influence_N = future_N.exp().clamp(1 - influence_low, 1 + influence_high)
    weighted_N = influence_N * advantage_N
    return clipped_surrogate(logp_N, old_logp_N, weighted_N, rows, clip_low=clip_low, clip_high=clip_high, dual=dual)


declare(future_weighted, vanishes_without_advantage=True, clips_ratio=True)


def clipped_share(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """[N] 1 where the clip removes an action's gradient, else 0."""
    r_N = ratio(logp_N, old_logp_N)
    return (((r_N > 1 + clip_high) & (advantage_N > 0)) | ((r_N < 1 - clip_low) & (advantage_N < 0))).to(r_N.dtype)
