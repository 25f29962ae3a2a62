"""Log-probabilities of given completions without gradient: the reference's, or held-out data's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlpost.policy.logprobs import LogitStats
from rlpost.policy.policy import Policy
from rlpost.types import Group, completions


@torch.no_grad()
def logprobs(policy: Policy, groups: Sequence[Group], *, temperature: float = 1.0, budget: int = 16384) -> Tensor:
    """[N] log-probability of every action of the groups, on the CPU, in passes of about `budget` tokens.

    Args:
        policy: as it is: its acting adapter, its precision.
        groups: the N actions are theirs, in order.
        temperature: logits are divided by it.
        budget: tokens of one pass.
    """
    was_training = policy.training
    policy.eval()
    pieces: list[Tensor] = []
    for some in passes(groups, budget):
        pieces.append(policy(policy.batch(some), LogitStats(temperature)).logp_N.cpu())
    policy.train(was_training)
    return torch.cat(pieces) if pieces else torch.zeros(0)


def passes(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """The groups in order, in lists of about `budget` tokens."""
    found: list[list[Group]] = []
    used = budget + 1
    for group in groups:
        cost = sum(len(group.prompt) + len(c.ids) for c in completions([group]))
        if used + cost > budget:
            found.append([])
            used = 0
        found[-1].append(group)
        used += cost
    return found
