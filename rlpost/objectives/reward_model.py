"""Losses of reward models and process reward models: rankings of completions, labels of steps.

Axes: P prompts, 2 = (chosen, rejected), K completions of a prompt, or labelled steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.objectives.ragged import widen


def bradley_terry(score_P2: Tensor, margin_P: Tensor | None = None, *, centre: float = 0.0) -> Tensor:
    """[P] −logσ(s_w − s_l − margin) + c·(s_w + s_l)² (Bradley & Terry 1952; InstructGPT, arXiv:2203.02155, eq. 1).

    The margin says by how much the chosen one is better (Touvron et al. 2023, arXiv:2307.09288, eq. 2); `centre` c
    draws the scores' level, which pairs leave free, to 0 (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    score_P2 = widen(score_P2)
    lead_P = score_P2[:, 0] - score_P2[:, 1]
    lead_P = lead_P if margin_P is None else lead_P - margin_P
    return -F.logsigmoid(lead_P) + centre * score_P2.sum(1).square()


def plackett_luce(score_PK: Tensor, reward_PK: Tensor) -> Tensor:
    """[P] Plackett–Luce: −log of the probability of the rewards' order (Plackett 1975; Luce 1959).

    Whoever is picked next is picked by e^score among those left: Σ_i log(e^{s_i} + Σ_{j: r_j < r_i} e^{s_j}) − s_i.
    Every term is the probability that i comes before all that are worse. Equals are in none of each other's sums: their
    order does not matter and they are not pulled together. With equals the result is a composite likelihood: an upper
    bound of the loss summed over all their orders (2^K terms), and like it 0 for scores far enough apart. With equals
    in each other's sums, as in Breslow's rule, m equals would cost at least log m each.

    NaN marks an unscored completion, which is absent. With two unequal rewards it is `bradley_terry`.
    """
    score_PK = widen(score_PK)
    worse_PKK = reward_PK[:, None, :] < reward_PK[:, :, None]
    itself_KK = torch.eye(score_PK.shape[1], dtype=torch.bool, device=score_PK.device)
    left_PKK = torch.where(worse_PKK | itself_KK, score_PK[:, None, :], -torch.inf)
    return (left_PKK.logsumexp(2) - score_PK).sum(1)


def process_reward(logit_K: Tensor, label_K: Tensor) -> Tensor:
    """[K] −y·logσ(x) − (1−y)·log(1 − σ(x)) of each step's logit, read after its last token (arXiv:2305.20050).

    A label y is right (1), wrong (0) or the share of rollouts that end well from there (Math-Shepherd,
    arXiv:2312.08935); a step without a label (NaN) costs nothing.
    """
    logit_K = widen(logit_K)
    known_K = label_K.nan_to_num().to(logit_K.dtype)
    loss_K = F.binary_cross_entropy_with_logits(logit_K, known_K, reduction="none")
    return torch.where(label_K.isnan(), 0.0, loss_K)
