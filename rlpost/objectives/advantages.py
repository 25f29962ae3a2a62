"""Advantages: how much better a completion (or an action) was than expected.

Axes: P prompts, G completions a prompt, K reward functions, N action tokens. In `reward_PG`, NaN marks a completion
that is unscored or excluded from learning: absent from every statistic, advantage 0. A group whose rewards are all
equal carries no signal: its advantage is exactly 0, without rounding error. A group of one has no baseline: 0.

An estimator is given what its parameters are named after: `reward_PG`; `length_PG`, the number of actions;
`greedy_P`, the reward of each prompt's greedy completion; `reward_PGK` and `weight_K`, the separate rewards;
`running_mean`, of all earlier rewards. Estimators that credit actions or steps are in credit.py and
turns.py, those that know more than rewards in baselines.py.
"""

from __future__ import annotations

from math import comb
from typing import Literal

import torch
from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.baselines import column_baseline, optimal_token_baseline, role_baseline
from rlpost.objectives.credit import monte_carlo_values, process, process_normalised, return_to_go
from rlpost.objectives.ragged import has_signal, widen
from rlpost.objectives.turns import gigpo, turn_leave_one_out, turn_normalised

__all__ = [
    "column_baseline",
    "ema_baseline",
    "gigpo",
    "greedy_baseline",
    "group_mean",
    "group_normalised",
    "leave_one_out",
    "length_weighted_baseline",
    "max_likelihood",
    "monte_carlo_values",
    "nonzero_rescaled",
    "optimal_token_baseline",
    "pass_at_k",
    "per_reward_normalised",
    "process",
    "process_normalised",
    "return_to_go",
    "reward",
    "role_baseline",
    "soft_leave_one_out",
    "turn_leave_one_out",
    "turn_normalised",
]
"""Names of advantages in recipes; `ema` and `whiten` are helpers."""


def reward(reward_PG: Tensor) -> Tensor:
    """[P, G] the reward itself, without a baseline (REINFORCE, Williams 1992)."""
    return widen(reward_PG).nan_to_num()


def group_mean(reward_PG: Tensor) -> Tensor:
    """[P, G] r − mean of the group (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)."""
    return _keep_signal(reward_PG, _centred(reward_PG))


declare(group_mean, compares_completions=True)


def group_normalised(reward_PG: Tensor, *, eps: float = 1e-4, std_over: Literal["group", "batch"] = "group") -> Tensor:
    """[P, G] (r − mean)/(std + eps), std with Bessel's correction (GRPO, arXiv:2402.03300, §4.1.2).

    The standard deviation is the group's own, or with `std_over="batch"` that of all rewards of the step.

    Raises:
        ValueError: for another `std_over`.
    """
    if std_over not in ("group", "batch"):
        raise ValueError(f"std_over={std_over!r}: a standard deviation is over the `group` or the `batch`")
    spread = _std(reward_PG) if std_over == "group" else _std(reward_PG.flatten()[None])
    return _keep_signal(reward_PG, _centred(reward_PG) / (spread + eps))


declare(group_normalised, compares_completions=True)


def leave_one_out(reward_PG: Tensor) -> Tensor:
    """[P, G] r_i − mean of the others = G/(G−1)·(r_i − mean) (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, eq. 8)."""
    count_P1 = _count(reward_PG)
    # Multiplied before it is divided: a quotient of integers would be rounded to float32.
    return _keep_signal(reward_PG, _centred(reward_PG) * count_P1 / (count_P1 - 1).clamp(min=1))


declare(leave_one_out, compares_completions=True)


def soft_leave_one_out(reward_PG: Tensor, *, beta: float) -> Tensor:
    """[P, G] r_i − β·log mean e^{r_j/β} over the others: what they say of the soft value of the prompt.

    The soft value β·log E[e^{r/β}], of samples of the reference, is what the best policy of E[r] − β·KL earns after its
    KL (A*-PO, Brantley et al. 2025, arXiv:2505.20686), and the baseline with which `squared_log_ratio` is right
    (arXiv:2602.05933); of a few samples it comes out too low. A completion's own reward has no part in it, so that it
    costs a policy gradient no bias. Large β give `leave_one_out`, small β the best of the others.

    Raises:
        ValueError: if β is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: the temperature of a soft value must be positive")
    scaled_PG = torch.where(reward_PG.isnan(), -torch.inf, widen(reward_PG) / beta)
    own_GG = torch.eye(reward_PG.shape[1], dtype=torch.bool, device=reward_PG.device)
    others_PG = scaled_PG[:, None, :].masked_fill(own_GG, -torch.inf).logsumexp(2)
    # Not of integers: their logarithm would be rounded to float32.
    count_P1 = (_count(reward_PG) - 1).clamp(min=1).to(others_PG.dtype)
    value_PG = beta * (others_PG - count_P1.log())
    return _keep_signal(reward_PG, widen(reward_PG) - value_PG)


declare(soft_leave_one_out, compares_completions=True)


def greedy_baseline(reward_PG: Tensor, greedy_P: Tensor) -> Tensor:
    """[P, G] r − r(greedy completion of the same prompt) (ReMax, Li et al. 2023, arXiv:2310.10505, eq. 6).

    The baseline does not depend on the samples, so a group of one works, and a group of equal rewards still learns
    whether it beat the greedy one. A prompt whose greedy completion is unscored has no baseline: 0.
    """
    return (widen(reward_PG) - widen(greedy_P)[:, None].to(widen(reward_PG).dtype)).nan_to_num()


def length_weighted_baseline(reward_PG: Tensor, length_PG: Tensor) -> Tensor:
    """[P, G] r − ΣL_i·r_i/ΣL_i (OPO, Hao et al. 2025, arXiv:2505.23585, eq. 7).

    The baseline of least variance if a completion's squared gradient grows as its length; a completion's own reward
    stands in it, as in the paper, which shrinks the gradient's expectation by about 1/G.
    """
    scored_PG = ~reward_PG.isnan()
    length_PG = torch.where(scored_PG, length_PG.to(widen(reward_PG).dtype), 0.0)
    weighted_P1 = (widen(reward_PG).nan_to_num() * length_PG).sum(1, keepdim=True)
    baseline_P1 = weighted_P1 / length_PG.sum(1, keepdim=True).clamp(min=1)
    return _keep_signal(reward_PG, widen(reward_PG) - baseline_P1)


declare(length_weighted_baseline, compares_completions=True)


def max_likelihood(reward_PG: Tensor) -> Tensor:
    """[P, G] (r − mean)/mean, 0 where the mean is not positive (MaxRL, arXiv:2602.02710).

    With 0/1 rewards the gradient of log(success probability): rarely solved prompts count more.
    """
    mean_P1 = _mean(reward_PG)
    scaled_PG = _centred(reward_PG) / torch.where(mean_P1 > 0, mean_P1, 1.0)
    return _keep_signal(reward_PG, torch.where(mean_P1 > 0, scaled_PG, 0.0))


declare(max_likelihood, compares_completions=True)


def pass_at_k(reward_PG: Tensor, *, k: int) -> Tensor:
    """[P, G] credit whose policy gradient (`sequence_sum`) is that of E[max of k samples], without bias.

    J = E[max_T r] over sets T of k independent samples, so ∇J = E[max_T · Σ_{i∈T} ∇logp_i] = k·E[max_T · ∇logp_i], i
    any member. A group of G holds C(G−1, k−1) such sets with i, whose mean estimates E[max_T | i] without bias; what
    does not depend on i may be subtracted, and the mean over the k-sets of the *others* is nearest to it:

        A_i = k·(mean of max over k-sets with i − mean of max over k-sets without i)

    and 1/G·Σ A_i ∇logp_i is unbiased. k = 1 is `leave_one_out`. With G = k there is no k-set of others: their
    (k−1)-set is used. The means are sums over ranks, weighed by the number of sets with that rank as their best.
    Rewards are any real numbers; with 0/1 rewards J is pass@k (Chen et al. 2021, arXiv:2107.03374).
    A group with fewer than k scored completions has advantage 0.

    Raises:
        ValueError: if k is not a number from 1 to G, or G = k = 1.
    """
    size = reward_PG.shape[1]
    if not 1 <= k <= size or size == 1:
        raise ValueError(f"k={k}: the best of k needs groups of at least max(k, 2) completions, not {size}")
    wide_PG = widen(reward_PG)
    result = torch.zeros_like(wide_PG)
    count_P = (~reward_PG.isnan()).sum(1)
    for count in sorted(set(count_P.tolist())):
        if count < max(k, 2):
            continue
        these = (count_P == count).nonzero()[:, 0]
        # NaN sorts last, so the scored ones are the first `count`.
        sorted_PG, order_PG = wide_PG[these].sort(dim=1)
        credit = sorted_PG[:, :count] @ _best_of_sets(count, k).to(wide_PG).T
        result[these] = torch.zeros_like(sorted_PG).scatter(1, order_PG[:, :count], credit)
    return _keep_signal(reward_PG, result)


declare(pass_at_k, compares_completions=True, k_in_group=True)


def nonzero_rescaled(reward_PG: Tensor) -> Tensor:
    """[P, G] α(r − mean), α the number of scored groups over that of those with a signal (GPG, Chu et al. 2025)."""
    scored, signal = int((_count(reward_PG) > 0).sum()), int(has_signal(reward_PG).sum())
    return _keep_signal(reward_PG, _centred(reward_PG) * (scored / max(signal, 1)))


declare(nonzero_rescaled, compares_completions=True)


def per_reward_normalised(reward_PGK: Tensor, weight_K: Tensor, *, eps: float = 1e-4) -> Tensor:
    """[P, G] each reward normalised in its group, their weighted sum normalised over the batch (arXiv:2601.05242).

    A reward without a signal in a group adds nothing there, and a group without any has advantage 0.
    """
    unscored_PG = reward_PGK.isnan().any(2)
    scored_PGK = torch.where(unscored_PG[:, :, None], torch.nan, widen(reward_PGK))
    apart = torch.stack([group_normalised(reward_PG, eps=eps) for reward_PG in scored_PGK.unbind(2)], 2)
    summed_PG = (apart * weight_K.to(apart.dtype)).sum(2)
    summed_PG = torch.where(unscored_PG, torch.nan, summed_PG)
    whole = _centred(summed_PG.flatten()[None]).view_as(summed_PG) / (_std(summed_PG.flatten()[None]) + eps)
    return _keep_signal(summed_PG, whole)


declare(per_reward_normalised, compares_completions=True)


def ema_baseline(reward_PG: Tensor, running_mean: float, *, decay: float = 0.9) -> Tensor:
    """[P, G] r − the running mean of all earlier rewards (Williams 1992); `ema` updates the mean with `decay`.

    Raises:
        ValueError: if `decay` is not from 0 to below 1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: a running mean keeps a share of 0 or more, below 1")
    return (widen(reward_PG) - running_mean).nan_to_num()


def ema(mean: float | None, reward_PG: Tensor, decay: float) -> float | None:
    """The running mean after a step: decay·mean + (1 − decay)·(the step's mean); None before the first reward."""
    scored = reward_PG[~reward_PG.isnan()]
    if not len(scored):
        return mean
    now = float(widen(scored).mean())
    return now if mean is None else decay * mean + (1 - decay) * now


def whiten(x_N: Tensor) -> Tensor:
    """[N] (x − mean)/√(variance + 1e-8) (REINFORCE++, Hu 2025, arXiv:2501.03262, eq. 6).

    Give it all actions of the update, those of all ranks. No actions, or all of one value, give zeros.
    """
    x_N = widen(x_N)
    # Rounding may make the mean of equal numbers differ from them, which the division would amplify.
    equal = len(x_N) > 0 and x_N.min() == x_N.max()
    centred_N = x_N - (x_N[0] if equal else x_N.sum() / max(len(x_N), 1))
    return centred_N / (centred_N.square().sum() / max(len(x_N), 1) + 1e-8).sqrt()


def _best_of_sets(count: int, k: int) -> Tensor:
    """[count, count] row i: the factor of each rank's reward in the credit of rank i, ranks from worst to best."""
    others = k if count > k else k - 1
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            # Sets with i whose best is j, and sets of the others whose best is j.
            below = j - (1 if i < j else 0)
            with_i = comb(i, k - 1) if j == i else comb(j - 1, k - 2) if j > i and k > 1 else 0
            without_i = comb(below, others - 1) if j != i else 0
            matrix[i, j] = k * (with_i / comb(count - 1, k - 1) - without_i / comb(count - 1, others))
    return matrix


def _count(reward_PG: Tensor) -> Tensor:
    return (~reward_PG.isnan()).sum(1, keepdim=True)


def _mean(reward_PG: Tensor) -> Tensor:
    return widen(reward_PG).nan_to_num().sum(1, keepdim=True) / _count(reward_PG).clamp(min=1)


def _centred(reward_PG: Tensor) -> Tensor:
    return widen(reward_PG) - _mean(reward_PG)


def _std(reward_PG: Tensor) -> Tensor:
    """[P, 1] with Bessel's correction."""
    squares_P1 = _centred(reward_PG).nan_to_num().square().sum(1, keepdim=True)
    return (squares_P1 / (_count(reward_PG) - 1).clamp(min=1)).sqrt()


def _keep_signal(reward_PG: Tensor, advantage_PG: Tensor) -> Tensor:
    keep_PG = has_signal(reward_PG)[:, None] & ~reward_PG.isnan()
    return torch.where(keep_PG, advantage_PG, 0.0)
