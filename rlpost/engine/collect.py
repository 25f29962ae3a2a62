"""Samples completions of groups, and picks the best of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlpost.engine.api import Engine
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import prompt_seeds
from rlpost.types import Group, Request


def collect(
    engine: Engine,
    groups: Sequence[Group],
    n: int,
    sampling: Sampling,
    seed: int,
    first: int = 0,
    keep: bool = False,
) -> list[Group]:
    """The groups with `n` sampled completions each, in place of what completions they had.

    Args:
        engine: what samples; the caller has given it its weights.
        groups: prompts with their rows.
        n: completions a prompt.
        sampling: how tokens are drawn.
        seed: of this call; each prompt gets its own from it.
        first: number of the first prompt when a larger set is collected in parts; parts then give what the
            whole would.
        keep: later prompts continue these completions, so their cache is kept.

    Raises:
        EngineError: see `Engine.generate`.
    """
    seeds = prompt_seeds(seed, first, len(groups))
    requests = [Request(g.prompt, n, sampling, s, keep=keep) for g, s in zip(groups, seeds, strict=True)]
    return [replace(g, completions=c) for g, c in zip(groups, engine.generate(requests), strict=True)]


def best_of(groups: Sequence[Group], totals: Sequence[Sequence[float | None]]) -> list[Group]:
    """Each group with its best-rewarded completion alone (the first of equals, or if none is scored).

    Args:
        groups: with completions.
        totals: one reward a completion; None (unscored) never wins over a number.
    """
    return [replace(g, completions=(g.completions[_best(rewards)],)) for g, rewards in zip(groups, totals, strict=True)]


def _best(rewards: Sequence[float | None]) -> int:
    scored = [i for i, reward in enumerate(rewards) if reward is not None]
    return max(scored, key=lambda i: rewards[i] or 0.0, default=0)
