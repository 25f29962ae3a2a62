"""Losses of critics and value networks. Axes: N action tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlpost.objectives.ragged import Ragged, widen


def value_loss(value_N: Tensor, return_N: Tensor, old_value_N: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """[N] ½·max((V − R)², (clip(V, V_old ± ε) − R)²), or ½(V − R)² without a clip.

    The clip is that of PPO's first implementation: a value that has moved further than ε from the one it had when
    the samples were taken gets no gradient, unless it moved the wrong way.
    """
    value_N, return_N = widen(value_N), widen(return_N)
    square_N = (value_N - return_N).square()
    if clip is None:
        return 0.5 * square_N
    near_N = widen(old_value_N) + (value_N - widen(old_value_N)).clamp(-clip, clip)
    return 0.5 * torch.maximum(square_N, (near_N - return_N).square())


def monte_carlo_value(logit_N: Tensor, label_N: Tensor) -> Tensor:
    """[N] −label·logσ(logit) − (1−label)·logσ(−logit): σ(logit) becomes the probability of the label.

    The label of a state is whether a completion sampled from it ended in the goal (FUDGE, Yang & Klein 2021,
    arXiv:2104.05218, eq. 5), so its own noise is √(V(1−V)).
    """
    logit_N = widen(logit_N)
    return F.binary_cross_entropy_with_logits(logit_N, label_N.to(logit_N.dtype), reduction="none")


def bellman_residual(logit_N: Tensor, label_N: Tensor, rows: Ragged) -> Tensor:
    """[N] ½(V(s_t) − V(s_{t+1}))², V = σ(logit) and the next value without gradient; at the end, the label.

    One-step bootstrapping of V(s) = Σ_v π(v|s)·V(s·v) from the token that was sampled (controlled decoding, Mudgal et
    al. 2023, arXiv:2310.17022).
    """
    logit_N = widen(logit_N)
    value_N = torch.sigmoid(logit_N)
    if not rows.actions:
        return value_N
    next_SL = rows.pad(value_N.detach())[:, 1:]
    next_N = rows.flatten(torch.cat([next_SL, next_SL.new_zeros(rows.completions, 1)], 1))
    at_end = torch.arange(rows.actions, device=rows.device) == rows.spread(rows.last)
    return 0.5 * (value_N - torch.where(at_end, label_N.to(value_N.dtype), next_N)).square()


def contrastive_value(logit_N: Tensor, label_N: Tensor, *, negatives: int = 1) -> Tensor:
    """[N] logistic regression of own endings (1) against others' (0), with `negatives` others for each own one.

    With the log of that number subtracted, the logit becomes log p(goal|s) − log p(goal|prompt): the value up to a
    constant of prompt and goal, which is all that guiding needs (noise-contrastive estimation, Gutmann & Hyvärinen
    2010; contrastive twist learning, Zhao et al. 2024, arXiv:2404.17546).
    """
    return monte_carlo_value(widen(logit_N) - math.log(negatives), label_N)
