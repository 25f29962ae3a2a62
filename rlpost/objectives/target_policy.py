"""A loss over the completions of one group: fit the policy to a target that their rewards make of what sampled them.

Axes: N action tokens of one group, S its completions.
"""

from __future__ import annotations

from torch import Tensor

from rlpost.facts import declare
from rlpost.objectives.ragged import Ragged


def target_policy(logp_N: Tensor, old_logp_N: Tensor, advantage_N: Tensor, rows: Ragged, *, eta: float = 1.0) -> Tensor:
    """[N] −S·q_i·log p_i at each action of completion i of a group (target policy optimisation, arXiv:2604.06159).

    p is the policy over the group, softmax of Σ logp over each completion, and q ∝ p_old·exp(A/η) the target
    without gradient; the group's mean is the cross-entropy of q and p. Its gradient by a completion's
    log-probability is p_i − q_i, which is 0 once the policy is the target. Where A is 0 throughout, the target is p_old
    itself. One value a completion: weigh it with `sequence_mean`. A is the completion's; where its actions differ,
    their mean counts. Completions without actions are no members of the group.

    Raises:
        ValueError: if η is not positive.
    """
    if eta <= 0:
        raise ValueError(f"eta={eta}: the temperature of a target must be positive")
    member_S = rows.lengths_S > 0
    log_p_M = rows.sum(logp_N)[member_S].log_softmax(0)
    log_old_M = rows.sum(old_logp_N)[member_S].log_softmax(0)
    target_M = (log_old_M + rows.mean(advantage_N)[member_S] / eta).softmax(0)
    loss_M = -len(target_M) * target_M * log_p_M
    return rows.spread(loss_M.new_zeros(rows.completions).masked_scatter(member_S, loss_M))


declare(target_policy, per_completion=True, couples_group=True)
