"""Which actions of an update are learned from: a factor on the advantage of each, from all actions of the update.

Axes: N action tokens. A function is given what its parameters are named after, under the policy that is about to be
updated and without gradient: `logp_N`; `entropy_N`, of the distribution that each action was drawn from;
`old_logp_N` and `advantage_N`, as a surrogate has them; and `uniform_N`, random numbers from [0, 1) that follow from
the recipe's seed and the number of the update.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlpost.objectives.entropy import action_covariance
from rlpost.objectives.ragged import widen


def top_entropy(entropy_N: Tensor, *, share: float = 0.2) -> Tensor:
    """[N] 1 where the entropy is among the highest `share` of the update's, else 0; equals count alike.

    Wang et al. 2025, arXiv:2506.01939: tokens at which an answer forks. The others have gradient 0 and still count in
    a mean over actions, as in the paper. In the states that are left, the expected gradient is what it was.

    Raises:
        ValueError: if `share` is not above 0 and at most 1.
    """
    _must_be_share(share)
    entropy_N = widen(entropy_N)
    if not len(entropy_N):
        return entropy_N
    least = entropy_N.topk(math.ceil(_number(share, entropy_N))).values[-1]
    return torch.where(entropy_N >= least, 1.0, 0.0).to(entropy_N.dtype)


def clip_covariance(
    logp_N: Tensor,
    advantage_N: Tensor,
    uniform_N: Tensor,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
) -> Tensor:
    """[N] 0 at ⌊share·N⌋ actions (one at least) drawn among those whose covariance is in [low, high], else 1: Clip-Cov.

    Cui et al. 2025, arXiv:2505.22617; `action_covariance` says what the covariance is. Those drawn, all
    candidates where there are no more, have gradient 0 and still count in a mean over actions. Which they are is up to
    `uniform_N` alone: the candidates with the smallest numbers. An action that PPO's clip leaves out may be among them.

    Raises:
        ValueError: if `share` is not above 0 and at most 1, or `low` is not below `high`.
    """
    _must_be_share(share)
    if not low < high:
        raise ValueError(f"low={low}, high={high}: the covariances to draw from begin at `low` and end at `high`")
    covariance_N = action_covariance(logp_N, advantage_N)
    factor_N = torch.ones_like(covariance_N)
    (candidate_C,) = ((covariance_N >= low) & (covariance_N <= high)).nonzero(as_tuple=True)
    drawn = max(1, math.floor(_number(share, covariance_N)))
    factor_N[candidate_C[uniform_N[candidate_C].argsort()[:drawn]]] = 0.0
    return factor_N


def top_covariance(logp_N: Tensor, advantage_N: Tensor, *, share: float = 2e-3) -> Tensor:
    """[N] 1 where the covariance is above 0 and among the highest `share` of the update's, else 0; equals count alike.

    Cui et al. 2025, arXiv:2505.22617: the actions that cost most entropy, which KL-Cov holds back (`old_kl`).
    Covariances of 0 and less cost none.

    Raises:
        ValueError: if `share` is not above 0 and at most 1.
    """
    _must_be_share(share)
    covariance_N = action_covariance(logp_N, advantage_N)
    if not len(covariance_N):
        return covariance_N
    least = covariance_N.topk(math.ceil(_number(share, covariance_N))).values[-1]
    return torch.where((covariance_N >= least) & (covariance_N > 0), 1.0, 0.0).to(covariance_N.dtype)


def second_moment(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, limit: float = 0.04) -> Tensor:
    """[N] 0 at the actions with the largest log² r, as many as it takes until the mean of log² r is `limit`, else 1.

    M2PO, Zheng et al. 2025, arXiv:2510.01161, algorithm 1. The mean is over the actions that PPO's clip is about, A > 0
    with r > 1 and A < 0 with r < 1, and only these can be left out; they still count in a mean over actions. It bounds
    how far they have moved together, where a clip bounds each. For a surrogate that does not clip, as in the paper; the
    authors' program clips at the largest log² r that is left, and never within 0.7 < r < 1.5.

    Raises:
        ValueError: if `limit` is negative.
    """
    if limit < 0:
        raise ValueError(f"limit={limit}: the mean of squared log-ratios is 0 or more")
    moved_N = widen(logp_N) - widen(old_logp_N)
    (onward_T,) = (moved_N * advantage_N > 0).nonzero(as_tuple=True)
    ascending_T, order_T = moved_N[onward_T].double().square().sort(stable=True)
    mean_T = ascending_T.cumsum(0) / torch.arange(1, len(ascending_T) + 1, device=moved_N.device)
    factor_N = torch.ones_like(moved_N)
    # Means of ever more of them in ascending order never fall, so those within the limit come first.
    factor_N[onward_T[order_T[int((mean_T <= limit).sum()) :]]] = 0.0
    return factor_N


def _must_be_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: a share of an update's actions is above 0 and at most 1")


def _number(share: float, x_N: Tensor) -> float:
    """share·N, without the last digits: 0.07 of 100 would be a little more than 7, and 0.29 a little less than 29."""
    return round(share * len(x_N), 9)
