# ruff: noqa: ARG001 - every surrogate takes the same arguments, whether it needs all of them or not
"""Policy losses, per action and to be minimised; r = exp(logp − old_logp) is never negative, the advantage can be.

Axes: N action tokens. Every surrogate takes (logp_N, old_logp_N, advantage_N, rows): the current policy's
log-probabilities with gradient, those of the policy that sampled, and the advantage, both without.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.kl import LIMIT
from rlpost.objectives.ragged import Ragged, widen


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
) -> Tensor:
    """[N] max(−A r, −A clip(r, 1−clip_low, 1+clip_high)) (PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    `dual` c bounds the loss of a negative advantage by −cA (Ye et al. 2020, arXiv:1912.09729, eq. 5); `delta`
    bounds r itself from above first.
    """
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
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, rows: Ragged, *, threshold: float = 0.2
) -> Tensor:
    """[N] −r·A, 0 where the probability has moved by more than `threshold` in its advantage's direction (DPPO).

    arXiv:2602.04879. Total variation is the sum of changes of probabilities; a ratio overstates those of rare tokens.
    """
    moved_N = widen(logp_N).detach().exp() - widen(old_logp_N).exp()
    out_N = ((advantage_N > 0) & (moved_N > threshold)) | ((advantage_N < 0) & (moved_N < -threshold))
    return torch.where(out_N, 0.0, -ratio(logp_N, old_logp_N) * advantage_N)


declare(divergence_masked, vanishes_without_advantage=True)


def clipped_share(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """[N] 1 where the clip removes an action's gradient, else 0."""
    r_N = ratio(logp_N, old_logp_N)
    return (((r_N > 1 + clip_high) & (advantage_N > 0)) | ((r_N < 1 - clip_low) & (advantage_N < 0))).to(r_N.dtype)
