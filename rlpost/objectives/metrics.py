"""Metrics of an update, as 1-D tensors whose means over all elements are logged.

Means do not depend on how an update is cut into parts or spread over ranks. Metrics that are not means (explained
variance, effective sample size) are computed from means of their parts at the end.

Axes: N action tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rlpost.objectives.ragged import widen
from rlpost.objectives.surrogates import ratio

_RESIDUAL, _RESIDUAL2, _RETURN, _RETURN2 = "residual", "residual_squared", "return", "return_squared"
_WEIGHT, _WEIGHT2 = "importance", "importance_squared"


def clipped_low(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, clip_low: float = 0.2) -> Tensor:
    """[N] 1 where the lower clip removes the gradient of an action with a negative advantage, else 0."""
    r_N = ratio(logp_N, old_logp_N)
    return ((r_N < 1 - clip_low) & (advantage_N < 0)).to(r_N.dtype)


def clipped_high(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, *, clip_high: float = 0.2) -> Tensor:
    """[N] 1 where the upper clip removes the gradient of an action with a positive advantage, else 0."""
    r_N = ratio(logp_N, old_logp_N)
    return ((r_N > 1 + clip_high) & (advantage_N > 0)).to(r_N.dtype)


def explained_variance_parts(value_N: Tensor, return_N: Tensor) -> dict[str, Tensor]:
    """The parts of `explained_variance`: four [N] tensors."""
    # In float64: the squares of equal returns, rounded to float32, would have a variance.
    value_N, return_N = value_N.detach().double(), return_N.detach().double()
    residual_N = return_N - value_N
    return {
        _RESIDUAL: residual_N,
        _RESIDUAL2: residual_N.square(),
        _RETURN: return_N,
        _RETURN2: return_N.square(),
    }


def explained_variance(means: Mapping[str, float]) -> float:
    """1 − Var(R − V)/Var(R): 1 for a perfect critic, 0 for a constant one; 0 if all returns are equal."""
    total = means[_RETURN2] - means[_RETURN] ** 2
    left = means[_RESIDUAL2] - means[_RESIDUAL] ** 2
    return 1.0 - left / total if total > 1e-12 * max(means[_RETURN2], 1e-30) else 0.0


def effective_sample_parts(weight_N: Tensor) -> dict[str, Tensor]:
    """The parts of `effective_sample_share`: two [N] tensors."""
    w_N = widen(weight_N).detach()
    return {_WEIGHT: w_N, _WEIGHT2: w_N.square()}


def effective_sample_share(means: Mapping[str, float]) -> float:
    """(Σw)²/(N·Σw²): the share of samples that equal weights would have needed for the same variance (Kong 1992)."""
    return means[_WEIGHT] ** 2 / means[_WEIGHT2] if means[_WEIGHT2] > 0 else 0.0


def without_parts(means: Mapping[str, float]) -> dict[str, float]:
    """The means, with parts replaced by the metrics that they make up."""
    parts = {_RESIDUAL, _RESIDUAL2, _RETURN, _RETURN2, _WEIGHT, _WEIGHT2}
    line = {name: x for name, x in means.items() if name not in parts}
    if _RESIDUAL in means:
        line["explained_variance"] = explained_variance(means)
    if _WEIGHT in means:
        line["effective_samples"] = effective_sample_share(means)
    return line
