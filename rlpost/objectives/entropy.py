"""What training does to a policy's entropy, and an entropy bonus that keeps it near a target.

Axes: N action tokens.
"""

from __future__ import annotations

from torch import Tensor

from rlpost.objectives.ragged import widen


def action_covariance(logp_N: Tensor, advantage_N: Tensor) -> Tensor:
    """[N] (A − mean of A)·(logp − mean of logp), means over all N actions: Cui et al. 2025, arXiv:2505.22617.

    Its mean is the covariance of log-probability and advantage. Where the logits of a softmax move along advantages, as
    by a natural gradient, the entropy falls at the rate of that covariance: likely actions that are good use it up, and
    so do unlikely ones that are bad.
    """
    logp_N, advantage_N = widen(logp_N), widen(advantage_N)
    if not len(logp_N):
        return logp_N
    return (advantage_N - advantage_N.mean()) * (logp_N - logp_N.mean())


def adaptive_entropy(
    coef: float, entropy: float, *, target: float, delta: float = 0.005, largest: float = 1.0
) -> tuple[float, float]:
    """(weight of the entropy bonus in this step, coefficient of the next step): Skywork-OR1, arXiv:2505.22312.

    The weight is the coefficient where the entropy is at most `target`, else 0. The coefficient then rises by `delta`
    where the entropy is at most `target`, else it falls by as much; it stays within [0, largest], or it would be below
    0 by the time that it is needed.

    Args:
        coef: the coefficient so far.
        entropy: of the policy that is about to be updated, in nats a token.
        target: what it should not fall below.
        delta: by how much the coefficient moves.
        largest: the most that it comes to.

    Raises:
        ValueError: if `delta` is not positive, or `coef` is not within [0, largest].
    """
    if delta <= 0 or not 0 <= coef <= largest:
        raise ValueError(f"coef={coef}, delta={delta}, largest={largest}: coef is within 0 and largest, delta above 0")
    if entropy <= target:
        return coef, min(coef + delta, largest)
    return 0.0, max(coef - delta, 0.0)
