"""Importance weights between two policies' log-probabilities of the same actions.

The engine and the trainer may differ by their kernels or precision, and rollouts may be those of another policy.
Axes: N action tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlpost.objectives.kl import LIMIT
from rlpost.objectives.ragged import Ragged, widen


def correction(
    trainer_N: Tensor,
    engine_N: Tensor,
    rows: Ragged,
    *,
    per: str = "token",
    cap: float = 2.0,
    mode: str = "truncate",
    floor: float = 0.0,
) -> Tensor:
    """[N] detached weights from w = exp(trainer − engine), of each token or of the whole completion.

    `truncate`: min(w, cap) (TIS, Yao et al. 2025; Espeholt et al. 2018, arXiv:1802.01561). `mask`: w where
    floor ≤ w ≤ cap, else 0 (MIS). Both log-probabilities are at the sampling temperature.

    Raises:
        ValueError: for another `per` or `mode`.
    """
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode={mode!r}: a correction either truncates or masks: `truncate` or `mask`")
    w_N = off_policy_ratio(trainer_N, engine_N, rows, per=per).detach()
    if mode == "truncate":
        return w_N.clamp(max=cap)
    return torch.where((w_N >= floor) & (w_N <= cap), w_N, 0.0)


def off_policy_ratio(logp_N: Tensor, behaviour_N: Tensor, rows: Ragged, *, per: str = "completion") -> Tensor:
    """[N] π/b of each `token`, or of the whole `completion` at every one of its actions; log-ratios within ±20.

    Only the whole completion's ratio makes the gradient from another policy's samples unbiased: a token's own ratio
    leaves out that the states before it were the other policy's too.

    Raises:
        ValueError: for another `per`.
    """
    if per not in ("token", "completion"):
        raise ValueError(f"per={per!r}: a ratio is of a `token` or of a `completion`")
    log_ratio_N = widen(logp_N) - widen(behaviour_N)
    if per == "completion":
        log_ratio_N = rows.spread(rows.sum(log_ratio_N))
    return log_ratio_N.clamp(-LIMIT, LIMIT).exp()
