"""Log-probabilities of given completions without gradient: the reference's, or held-out data's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice, zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from rlpost import ranks
from rlpost.errors import OutOfMemoryError
from rlpost.policy.logprobs import LogitStats, PolicyOutput
from rlpost.policy.policy import Policy
from rlpost.types import Group, completions
from rlpost.unexpected import of_memory

T = TypeVar("T")


def logprobs(policy: Policy, groups: Iterable[Group], *, temperature: float = 1.0, budget: int = 16384) -> Tensor:
    """[N] log-probability of every action of the groups, on the CPU, in passes of about `budget` tokens.

    Args:
        policy: as it is: its acting adapter, its precision.
        groups: the N actions are theirs, in order; not all of them need to be in memory.
        temperature: logits are divided by it.
        budget: tokens of one pass.
    """
    return read(policy, groups, LogitStats(temperature), lambda output: output.logp_N, budget=budget)


@torch.no_grad()
def read(
    policy: Policy,
    groups: Iterable[Group],
    stats: LogitStats,
    take: Callable[[PolicyOutput], Tensor],
    *,
    budget: int = 16384,
) -> Tensor:
    """[N, …] what `take` takes of a pass that computes `stats`, for every action of the groups; else as `logprobs`."""
    was_training = policy.training
    policy.eval()
    pieces = over_passes(policy, groups, budget, lambda some: take(policy(policy.batch(some), stats)).cpu())
    policy.train(was_training)
    return torch.cat(pieces) if pieces else torch.zeros(0)


def over_passes(policy: Policy, groups: Iterable[Group], budget: int, work: Callable[[list[Group]], T]) -> list[T]:
    """`work` of the groups in lists of about `budget` tokens, or of less each where ranks take turns; in order.

    `work` makes passes of `policy`'s model. A list that does not fit into memory is worked on in two halves, down to
    single completions; not where weights are in shards, since others wait within a pass that broke off.

    Raises:
        OutOfMemoryError: a single completion does not fit.
    """
    own = islice(passes(groups, budget // ranks.count()), ranks.index(), None, ranks.count())
    fitting = _whole if policy.in_shards else _fitting

    def mine() -> list[list[T]]:
        with policy.in_turn():
            return [fitting(some, work) for some in own]

    every = ranks.together(mine)
    return [found for turn in zip_longest(*every, fillvalue=()) for some in turn for found in some]


def _whole(some: list[Group], work: Callable[[list[Group]], T]) -> list[T]:
    return [work(some)]


def _fitting(some: list[Group], work: Callable[[list[Group]], T]) -> list[T]:
    """`work` of the groups, or of each half of them where memory is short."""
    try:
        return [work(some)]
    except (RuntimeError, MemoryError) as error:
        if not of_memory(error):
            raise
    halves = _halves(some)
    if halves is None:
        raise OutOfMemoryError(
            f"out of memory while one completion of {len(some[0].prompt)} + {len(some[0].completions[0].ids)} tokens "
            "was scored; lower max_length or sampling.max_new_tokens, or use a smaller model"
        )
    return [found for half in halves for found in _fitting(half, work)]


def _halves(some: list[Group]) -> tuple[list[Group], list[Group]] | None:
    """Groups, or a single one's completions, in two; None of one completion."""
    if len(some) > 1:
        return some[: len(some) // 2], some[len(some) // 2 :]
    (group,) = some
    every = group.completions
    if len(every) < 2:
        return None
    first, second = every[: len(every) // 2], every[len(every) // 2 :]
    return [replace(group, completions=first)], [replace(group, completions=second)]


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
