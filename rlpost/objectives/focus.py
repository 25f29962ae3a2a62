"""Which actions of an update are learned from: a factor on the advantage of each, from all actions of the update.

Axes: N action tokens. A function is given what its parameters are named after, under the policy that is about to be
updated and without gradient: `logp_N`; `entropy_N`, of the distribution that each action was drawn from; and
`old_logp_N` and `advantage_N`, as a surrogate has them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlpost.objectives.ragged import widen


def top_entropy(entropy_N: Tensor, *, share: float = 0.2) -> Tensor:
    """[N] 1 where the entropy is among the highest `share` of the update's, else 0; equals count alike.

    Wang et al. 2025, arXiv:2506.01939: tokens at which an answer forks. The others have gradient 0 and still count in
    a mean over actions, as in the paper. In the states that are left, the expected gradient is what it was.

    Raises:
        ValueError: if `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: the share of actions to learn from is above 0 and at most 1")
    entropy_N = widen(entropy_N)
    if not len(entropy_N):
        return entropy_N
    least = entropy_N.topk(math.ceil(share * len(entropy_N))).values[-1]
    return torch.where(entropy_N >= least, 1.0, 0.0).to(entropy_N.dtype)
