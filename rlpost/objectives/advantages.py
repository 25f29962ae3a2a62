"""Advantages: how much better a completion (or an action) was than expected.

Axes: P prompts, G completions a prompt, N action tokens. In `reward_PG`, NaN marks a completion that is
unscored or left out of learning: absent from every statistic, advantage 0. A group whose rewards are all
equal carries no signal: its advantage is exactly 0, whatever rounding says. A group of one has no baseline: 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives.rows import Rows, has_signal, widen


def group_mean(reward_PG: Tensor) -> Tensor:
    """[P, G] r − mean of the group (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)."""
    return _keep_signal(reward_PG, _centred(reward_PG))


def group_normalised(reward_PG: Tensor, *, eps: float = 1e-4) -> Tensor:
    """[P, G] (r − mean)/(std + eps), std with Bessel's correction (GRPO, arXiv:2402.03300, §4.1.2)."""
    centred_PG = _centred(reward_PG)
    count_P1 = (~reward_PG.isnan()).sum(1, keepdim=True)
    variance_P1 = centred_PG.nan_to_num().square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)
    return _keep_signal(reward_PG, centred_PG / (variance_P1.sqrt() + eps))


def leave_one_out(reward_PG: Tensor) -> Tensor:
    """[P, G] r_i − mean of the others = G/(G−1)·(r_i − mean) (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, eq. 8)."""
    count_P1 = (~reward_PG.isnan()).sum(1, keepdim=True)
    # Multiplied before it is divided: a quotient of integers would be rounded to float32.
    return _keep_signal(reward_PG, _centred(reward_PG) * count_P1 / (count_P1 - 1).clamp(min=1))


def return_to_go(reward_N: Tensor, rows: Rows, gamma: float = 1.0) -> Tensor:
    """[N] Σ_{k≥t} γ^{k−t} r_k within each completion (REINFORCE, Williams 1992)."""
    if gamma == 1.0:
        return rows.suffix_sum(reward_N)
    padded_SL = rows.pad(widen(reward_N))
    returns = torch.zeros_like(padded_SL)
    running_S = padded_SL.new_zeros(rows.completions)
    for t in range(padded_SL.shape[1] - 1, -1, -1):
        running_S = padded_SL[:, t] + gamma * running_S
        returns[:, t] = running_S
    return rows.flatten(returns)


def _centred(reward_PG: Tensor) -> Tensor:
    wide_PG = widen(reward_PG)
    count_P1 = (~reward_PG.isnan()).sum(1, keepdim=True).clamp(min=1)
    return wide_PG - wide_PG.nan_to_num().sum(1, keepdim=True) / count_P1


def _keep_signal(reward_PG: Tensor, advantage_PG: Tensor) -> Tensor:
    keep_PG = has_signal(reward_PG)[:, None] & ~reward_PG.isnan()
    return torch.where(keep_PG, advantage_PG, 0.0)
