"""Log-probabilities of given completions without gradient: the reference's, or held-out data's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice, zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from rlpost import ranks
from rlpost.policy.logprobs import LogitStats
from rlpost.policy.policy import Policy
from rlpost.types import Group, completions

T = TypeVar("T")


@torch.no_grad()
def logprobs(policy: Policy, groups: Iterable[Group], *, temperature: float = 1.0, budget: int = 16384) -> Tensor:
    """[N] log-probability of every action of the groups, on the CPU, in passes of about `budget` tokens.

    Args:
        policy: as it is: its acting adapter, its precision.
        groups: the N actions are theirs, in order; not all of them need to be in memory.
        temperature: logits are divided by it.
        budget: tokens of one pass.
    """
    was_training = policy.training
    policy.eval()
    stats = LogitStats(temperature)
    pieces = over_passes(policy, groups, budget, lambda some: policy(policy.batch(some), stats).logp_N.cpu())
    policy.train(was_training)
    return torch.cat(pieces) if pieces else torch.zeros(0)


def over_passes(policy: Policy, groups: Iterable[Group], budget: int, work: Callable[[list[Group]], T]) -> list[T]:
    """`work` of the groups in lists of about `budget` tokens, or of less each where ranks take turns; in order.

    `work` makes passes of `policy`'s model.
    """
    own = islice(passes(groups, budget // ranks.count()), ranks.index(), None, ranks.count())

    def mine() -> list[T]:
        with policy.in_turn():
            return [work(some) for some in own]

    every = ranks.together(mine)
    return [found for turn in zip_longest(*every) for found in turn if found is not None]


def passes(groups: Iterable[Group], budget: int) -> Iterator[list[Group]]:
    """The groups in order, in lists of about `budget` tokens."""
    some: list[Group] = []
    used = 0
    for group in groups:
        cost = sum(len(group.prompt) + len(c.ids) for c in completions([group]))
        if some and used + cost > budget:
            yield some
            some, used = [], 0
        some.append(group)
        used += cost
    if some:
        yield some
