"""Losses that teach a model to score: completions against each other, and the steps of one.

Axes: P prompts, 2 = (chosen, rejected), K completions of a prompt (or steps of all completions).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.objectives.rows import widen


def bradley_terry(score_P2: Tensor, margin_P: Tensor, *, centre: float = 0.0) -> Tensor:
    """[P] −logσ(s_w − s_l − margin) + c·(s_w + s_l)² (Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    The margin says by how much the chosen one is better (Touvron et al. 2023, arXiv:2307.09288, eq. 2; 0 if nobody
    said); `centre` c draws the scores' level, which pairs leave free, to 0 (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    score_P2 = widen(score_P2)
    return -F.logsigmoid(score_P2[:, 0] - score_P2[:, 1] - margin_P) + centre * score_P2.sum(1).square()


def ranking(score_PK: Tensor, reward_PK: Tensor) -> Tensor:
    """[P] Plackett–Luce: −log of the probability that picking by e^score, without replacement, gives the rewards' order.

    Σ over completions i of log Σ_{j: r_j ≤ r_i} e^{s_j} − s_i (Plackett 1975; Luce 1959), Breslow's way with ties:
    equals all stand in each other's sums, so their order does not matter, and only sums over someone else count. The
    last picks are certain and count 0. NaN marks an unscored completion, which is absent. With two unequal rewards
    it is `bradley_terry`.
    """
    score_PK = widen(score_PK)
    scored_PK = ~reward_PK.isnan()
    not_above_PKK = (reward_PK[:, None, :] <= reward_PK[:, :, None]) & scored_PK[:, None, :]
    beats_some_PK = (reward_PK[:, None, :] < reward_PK[:, :, None]).any(2) & scored_PK
    sums_PK = torch.where(not_above_PKK, score_PK[:, None, :], -torch.inf)
    # A row without anyone (an unscored one) would have an infinite logarithm, and a NaN gradient.
    sums_PK = torch.where(scored_PK[..., None], sums_PK, 0.0).logsumexp(2)
    return torch.where(beats_some_PK, sums_PK - score_PK, 0.0).sum(1)


def process_reward(logit_K: Tensor, label_K: Tensor) -> Tensor:
    """[K] binary cross-entropy of each step's logit, read after its last token (Lightman et al. 2023, arXiv:2305.20050).

    Labels are right (1) or wrong (0), or the share of rollouts that end well from there (arXiv:2312.08935).
    """
    logit_K = widen(logit_K)
    return F.binary_cross_entropy_with_logits(logit_K, label_K.to(logit_K.dtype), reduction="none")
