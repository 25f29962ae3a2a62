"""Supervised losses per action: likelihood, and divergences from a teacher's distributions.

Axes: N action tokens, V vocabulary. A function is given what its parameters are named after: `logp_N`, the
log-probability of each target; `logp_NV`, of the whole vocabulary; `teacher_NV`, the same of a teacher; `target_N`;
`label_N`, True where the row's completion is to be imitated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlpost.objectives.kl import full_kl
from rlpost.objectives.ragged import widen


def nll(logp_N: Tensor) -> Tensor:
    """[N] −logp: maximum likelihood."""
    return -widen(logp_N)


def dynamic_fine_tuning(logp_N: Tensor) -> Tensor:
    """[N] −p.detach()·logp: the token's own probability as weight (DFT, Wu et al. 2025, arXiv:2508.05629, eq. 9)."""
    return -widen(logp_N).detach().exp() * logp_N


def confidence_weighted(logp_N: Tensor) -> Tensor:
    """[N] −p(1−p)·logp, p(1−p) without gradient: φ of CHORD (Zhang et al. 2025, arXiv:2508.11408, §3.3).

    Most is learned of tokens that the model is of two minds about, nothing of those that it knows or never writes.
    The gradient is that of −p + p²/2, which is finite: a token costs at most ½ more than one that is certain.
    """
    logp_N = widen(logp_N)
    fixed_N = logp_N.detach()
    return fixed_N.exp() * fixed_N.expm1() * logp_N


def label_smoothing(logp_N: Tensor, logp_NV: Tensor, *, epsilon: float = 0.1) -> Tensor:
    """[N] −(1−ε)·logp − ε·mean over the vocabulary of logp (Szegedy et al. 2015, arXiv:1512.00567, §7).

    Raises:
        ValueError: if ε is not in [0, 1).
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon is the share of the target that is spread, in [0, 1), got {epsilon}")
    return -(1 - epsilon) * widen(logp_N) - epsilon * widen(logp_NV).mean(-1)


def unlikelihood(logp_N: Tensor) -> Tensor:
    """[N] −log(1 − p): makes given tokens unlikely (Welleck et al. 2019, arXiv:1908.04319, eq. 4)."""
    # p = 1 has infinite loss, one bit below it a finite one.
    logp_N = widen(logp_N).clamp(max=-torch.finfo(widen(logp_N).dtype).eps)
    return -log1mexp(logp_N)


def likelihood_by_label(logp_N: Tensor, label_N: Tensor, *, alpha: float = 1.0) -> Tensor:
    """[N] −logp where the label is true, −α·log(1 − p) where it is false (Welleck et al., arXiv:1908.04319, eq. 5).

    The paper adds both terms at every token, the second for tokens other than the target; here a
    completion is wanted or unwanted, and each of its tokens has one of the two. With respect to its token's logit,
    neither gradient exceeds 1 or α: p → 1 makes the loss large, but not the step.

    Raises:
        ValueError: if α is negative.
    """
    if alpha < 0:
        raise ValueError(f"alpha is the weight of unwanted completions, 0 or more, got {alpha}")
    return torch.where(label_N.bool(), nll(logp_N), alpha * unlikelihood(logp_N))


def forward_kl(logp_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """[N] KL(teacher || student): covers all that the teacher says (Hinton et al. 2015, arXiv:1503.02531)."""
    return full_kl(teacher_NV, logp_NV)


def reverse_kl(logp_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """[N] KL(student || teacher): says only what the teacher would (MiniLLM, Gu et al. 2023, arXiv:2306.08543)."""
    return full_kl(logp_NV, teacher_NV)


def jensen_shannon(logp_NV: Tensor, teacher_NV: Tensor, *, mix: float = 0.5) -> Tensor:
    """[N] β·KL(teacher || m) + (1−β)·KL(student || m), m = β·teacher + (1−β)·student, β = `mix`.

    Generalised knowledge distillation (GKD, arXiv:2306.13649, eq. 1).
    Divided by β(1−β), its limits are the forward KL at β → 0 and the reverse KL at β → 1; as in the paper it is not.

    Raises:
        ValueError: if `mix` is not strictly between 0 and 1.
    """
    if not 0 < mix < 1:
        raise ValueError(f"mix is strictly between 0 (forward_kl) and 1 (reverse_kl), got {mix}")
    # Where both are −inf, logaddexp has no gradient.
    least = torch.finfo(torch.float32).min
    student, teacher = widen(logp_NV).clamp(min=least), widen(teacher_NV).clamp(min=least)
    mixture = torch.logaddexp(teacher + math.log(mix), student + math.log(1 - mix))
    return mix * full_kl(teacher, mixture) + (1 - mix) * full_kl(student, mixture)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, to full precision near 0 and far from it (Mächler 2012)."""
    near = x > -math.log(2)
    # Each branch sees only arguments it is finite for: where() would pass the other's NaN gradient on.
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-close.expm1()).log(), (-far.exp()).log1p())
