"""Groups filled with completions, and the best of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlpost.engine.api import Engine
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import prompt_streams
from rlpost.types import Group


def collect(
    engine: Engine,
    groups: Sequence[Group],
    n: int,
    sampling: Sampling,
    seed: int,
    greedy: bool = False,
    first: int = 0,
) -> list[Group]:
    """The groups with `n` sampled completions each, in place of what completions they had.

    Args:
        engine: what samples; synchronised by the caller.
        groups: prompts with their examples.
        n: completions a prompt.
        sampling: how tokens are drawn.
        seed: of this call's random streams.
        greedy: take the most likely tokens.
        first: number of the first prompt when a larger set is collected in parts; parts then give what the
            whole would.

    Raises:
        EngineError: see `Engine.generate`.
    """
    streams = prompt_streams(seed, first, len(groups))
    sampled = engine.generate([g.prompt for g in groups], n, sampling, streams, greedy)
    return [replace(g, completions=c) for g, c in zip(groups, sampled, strict=True)]


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
