"""A surrogate that counts from the reference: the policy's log-ratio to it is fitted to the advantage.

Axes: N action tokens, S completions.
"""

from __future__ import annotations

from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.ragged import Ragged, widen


def advantage_regression(
    logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, rows: Ragged, *, beta: float
) -> Tensor:
    """[N] (β·Δ − A)²/2β at each action, Δ the completion's log-probability less the reference's (A*-PO).

    Brantley et al. 2025, arXiv:2505.20686, stage two, divided by 2β: its slope along log π is βΔ − A. With A = r − V*,
    V* = β·log E[e^{r/β}] of completions of the reference, it is 0 for every completion at the policy of greatest
    E[r] − β·KL(policy ‖ reference), whatever sampled. Of the policy's own completions the expected slope is that
    objective's gradient, whatever is in the place of V*. `old_logp_N` holds the reference's log-probabilities, not the
    sampler's. One value a completion: weigh it with `sequence_mean`. The advantage is the completion's; where its
    actions differ, their mean counts.

    Raises:
        ValueError: if β is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}: the weight of the log-ratio to the reference must be positive")
    apart_S = rows.sum(widen(logp_N) - widen(old_logp_N))
    return rows.spread((beta * apart_S - rows.mean(advantage_N)).square() / (2 * beta))


declare(advantage_regression, per_completion=True, from_reference=True)
