"""Monte-Carlo rollouts from inside completions, to estimate the values of states (VinePPO, Math-Shepherd)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlpost.data.visible import visible
from rlpost.engine.api import Engine
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import prompt_seeds
from rlpost.types import Completion, Group, Request, completions

State = tuple[int, tuple[int, ...]]
"""A group's number, and the completion's ids up to the state."""


def mc_rollouts(
    engine: Engine,
    tokenizer: Any,
    groups: Sequence[Group],
    starts: Sequence[Sequence[int]],
    k: int,
    sampling: Sampling,
    seed: int,
) -> list[Group]:
    """For every given state, a group of `k` completions that begin as it does and are sampled anew from there.

    Prompt, row and text are those of the whole completion, so that rewards read them as any other. Equal states of a
    group are sampled once: the start of the first step is the prompt itself.

    Args:
        engine: sampled the completions, with the same weights; it continues from their cache.
        tokenizer: the policy's, to join the texts.
        groups: with completions.
        starts: for each of the S completions, the indices into its ids of its states.
        k: rollouts a state.
        sampling: how tokens are drawn; a rollout may be as long as its completion might have been.
        seed: of this call; each state gets its own from it.

    Returns:
        Groups in the order of completions and of their starts.
    """
    owners = [g for g, group in enumerate(groups) for _ in group.completions]
    states: list[State] = [
        (owner, tuple(c.ids[:start].tolist()))
        for owner, c, own in zip(owners, completions(groups), starts, strict=True)
        for start in own
    ]
    distinct = list(dict.fromkeys(states))
    requests = [
        Request(
            np.concatenate([groups[g].prompt, np.array(prefix, np.int32)]),
            k,
            sampling,
            state_seed,
            limit=sampling.max_new_tokens - len(prefix),
        )
        for (g, prefix), state_seed in zip(distinct, prompt_seeds(seed, 0, len(distinct)), strict=True)
    ]
    found: dict[State, Group] = {}
    for (g, prefix), tails in zip(distinct, engine.generate(requests), strict=True):
        whole = tuple(_joined(prefix, tail, tokenizer) for tail in tails)
        found[g, prefix] = replace(groups[g], completions=whole)
    return [found[state] for state in states]


def as_answers(fresh: Sequence[Group]) -> list[Group]:
    """The rollouts as rewards read them: tokens before the state are actions too, and count in the length."""
    return [
        replace(
            g,
            completions=tuple(
                replace(c, action=np.ones(len(c.ids), np.bool_), logprobs=c.logprobs[:0]) for c in g.completions
            ),
        )
        for g in fresh
    ]


def _joined(prefix: tuple[int, ...], tail: Completion, tokenizer: Any) -> Completion:
    """The whole completion; only the new tokens are actions."""
    text = visible(prefix, tokenizer, ()) + tail.text  # nothing ended before the state
    ids = np.concatenate([np.array(prefix, np.int32), tail.ids])
    action = np.concatenate([np.zeros(len(prefix), np.bool_), tail.action])
    return replace(tail, ids=ids, action=action, text=text)
