"""Per-token estimators of KL(policy || reference), and the KL term inside the reward.

Axes: N action tokens, S completions, P prompts, G completions a prompt. Schulman (2020), "Approximating KL divergence".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rlpost.objectives.ragged import Ragged, widen

ROUNDING = 1e-4
"""Log-ratios of the same weights may differ by as much in float32, by the order of their sums."""
LIMIT = 20.0
"""Log-ratios are clamped to ±LIMIT before `exp`: e^20 is far outside every clip, and finite in bfloat16."""


def k1(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """[N] logp − ref: unbiased. Belongs in the reward; as a loss its expected gradient is zero."""
    return widen(logp_N) - widen(reference_N)


def k2(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """[N] ½(logp − ref)²."""
    return 0.5 * k1(logp_N, reference_N) ** 2


def k3(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """[N] exp(ref − logp) − 1 − (ref − logp): unbiased as a value, never negative, biased as a gradient."""
    log_ratio = (widen(reference_N) - widen(logp_N)).clamp(-LIMIT, LIMIT)
    return log_ratio.expm1() - log_ratio


def k3_weighted(logp_N: Tensor, reference_N: Tensor, sampled_N: Tensor) -> Tensor:
    """[N] r·k3 with r = exp(logp − sampled), `sampled_N` the sampler's: DeepSeek-V3.2, arXiv:2512.02556, eq. 7.

    As a loss, with gradient through r too, its expectation is the KL of each state that the sampler visited, whichever
    policy that was, and so is its gradient: what `full_kl` has there, from one action. That an action changes which
    states follow is left out, as it is by `k2`.
    """
    r_N = (widen(logp_N) - widen(sampled_N)).clamp(-LIMIT, LIMIT).exp()
    return r_N * k3(logp_N, reference_N)


def kl_from_old(logp_N: Tensor, old_logp_N: Tensor, *, estimator: Literal["k3", "abs"] = "k3") -> Tensor:
    """[N] r − 1 − log r, r = exp(logp − old_logp): KL(old || policy) in each state, from an action that `old` sampled.

    As a loss its gradient is (r − 1)·∇logp: each action is drawn back to its old probability, and in expectation that
    is the KL's own gradient, since E[r·∇logp] = 0 under `old`. −log r alone has that expectation too, and yet it raises
    the probability of every action that it is applied to, so it is none for a choice among them. `abs` is |log r|,
    whose gradient ±∇logp is as large for r = 1.01 as for r = 2: no KL's, but what verl and the authors of KL-Cov
    (arXiv:2505.22617) compute. Up to 1e-4 it is 0 here, since rounding would decide on which side of 0 it is.

    Raises:
        ValueError: for another `estimator`.
    """
    if estimator == "k3":
        return k3(old_logp_N, logp_N)
    if estimator == "abs":
        size_N = k1(logp_N, old_logp_N).abs()
        return torch.where(size_N > ROUNDING, size_N, 0.0)
    raise ValueError(f"estimator={estimator!r}: the KL to the old policy is estimated by `k3` or by `abs`")


def kl_in_reward(
    logp_N: Tensor,
    reference_N: Tensor,
    rows: Ragged,
    group_size: int,
    estimator: Callable[[Tensor, Tensor], Tensor] = k1,
) -> Tensor:
    """[N] Σ_{k≥t} k1 (the exact choice), centred leave-one-out over the group: the advantage loses beta times this.

    It bypasses the advantage's normaliser, which would scale a KL of 1e-3 up to 1 in groups of equal reward.
    The baseline of an action is the mean whole-completion KL of the *other* completions of its group: independent
    of the action, hence without bias. Rows lie group after group, `group_size` each.

    Raises:
        ValueError: if the rows are not whole groups.
    """
    if group_size < 1 or rows.completions % group_size:
        raise ValueError(f"{rows.completions} completions are not groups of {group_size}")
    kl_N = estimator(logp_N, reference_N).detach()
    to_go_N = rows.suffix_sum(kl_N)
    if group_size == 1:
        return to_go_N
    learned_PG = (rows.lengths_S > 0).to(kl_N.dtype).view(-1, group_size)
    kl_PG = rows.sum(kl_N).view(-1, group_size)
    others_PG = (learned_PG.sum(1, keepdim=True) - learned_PG).clamp(min=1)
    baseline_PG = (kl_PG.sum(1, keepdim=True) - kl_PG) / others_PG
    return to_go_N - rows.spread(baseline_PG.flatten())


def full_kl(logp_NV: Tensor, reference_NV: Tensor) -> Tensor:
    """[N] Σ_v π(v)·(log π(v) − log ref(v)): KL(π || ref) of the whole distribution in each state, of [N, V] logs.

    As a loss it ignores that an action changes which states follow: its gradient is that of k2, without the noise.
    """
    logp_NV, reference_NV = widen(logp_NV), widen(reference_NV)
    # Tokens of probability 0 add 0, though their logarithm is −inf.
    difference = torch.where(logp_NV == -torch.inf, 0.0, logp_NV - reference_NV)
    return (logp_NV.exp() * difference).sum(-1)


def adaptive(beta: float, kl: float, *, target: float, horizon: float, count: int) -> float:
    """β·(1 + clip(KL/target − 1, −0.2, 0.2)·count/horizon) (Ziegler et al. 2019, arXiv:1909.08593, §2.2).

    Args:
        beta: the coefficient so far.
        kl: in nats a completion, summed over its actions, averaged over the update's completions.
        target: what it should be.
        horizon: completions over which the coefficient moves.
        count: completions of the update.
    """
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * count / horizon)
