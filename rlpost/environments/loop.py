"""Episodes of several turns: the model writes, an environment replies, until one of them ends the episode.

An environment is a function (text of the model's last turn, its turns so far, the row) -> its reply as text, or None
when the episode is over. Replies become part of the completion as tokens that are not actions: the model reads them,
and nothing is learned from them.

Episodes run in lock-step, all of them a turn at a time; an engine that takes requests while it works on others runs
each by itself. Requests and seeds are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from rlpost import ranks
from rlpost.data.codec import Codec, make_codec
from rlpost.engine.api import Engine, FreeEngine
from rlpost.engine.collect import collect
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import prompt_seeds
from rlpost.environments.episode import Episode, Limits
from rlpost.environments.free import run_freely
from rlpost.environments.replies import Replies
from rlpost.policy.policy import Policy
from rlpost.types import FAILED, Completion, Group
from rlpost.usercode.bound import Bound


def collect_turns(
    engine: Engine,
    codec: Codec,
    groups: Sequence[Group],
    n: int,
    sampling: Sampling,
    seed: int,
    first: int = 0,
    *,
    environment: Bound,
    turns: int,
    max_positions: int,
) -> list[Group]:
    """The groups with `n` episodes each, in place of what completions they had.

    Args:
        engine: samples; the caller has updated its weights.
        codec: tokenises replies.
        groups: prompts with their rows.
        n: episodes a prompt.
        sampling: how tokens are drawn; `max_new_tokens` holds for a whole episode, replies included.
        seed: of this call's random numbers. An episode depends on its prompt's seed, its index and its turns.
        first: number of the first prompt when a larger set is collected in parts.
        environment: the function that replies.
        turns: most turns of the model.
        max_positions: positions of the model.

    Raises:
        RewardError: the environment failed, or did not reply with text.
        EngineError: generation failed.
    """
    limits = Limits(sampling, turns, max_positions)
    seeds = prompt_seeds(seed, first, len(groups))
    episodes = [
        Episode(group, episode_seed, limits)
        for group, prompt_seed in zip(groups, seeds, strict=True)
        for episode_seed in prompt_seeds(prompt_seed, 0, n)
    ]
    if isinstance(engine, FreeEngine):
        costs = [len(e.group.prompt) + sampling.max_new_tokens for e in episodes]
        done = ranks.divided(episodes, costs, partial(_freely, engine, environment, codec))
    else:
        done = _in_lock_step(engine, environment, codec, episodes)
    _report(environment, done)
    found = iter(done)
    return [replace(g, completions=tuple(next(found) for _ in range(n))) for g in groups]


class Collect(Protocol):
    """`collect`, or `collect_turns` with its environment."""

    def __call__(self, groups: Sequence[Group], n: int, sampling: Sampling, seed: int, first: int = 0) -> list[Group]:
        """The groups with `n` completions each."""
        ...


def collector(engine: Engine, policy: Policy, environment: Bound | None, turns: int, *, keep: bool = False) -> Collect:
    """How completions are collected: in one turn, or in several with an environment.

    With `keep`, later prompts continue completions of one turn, so their cache is kept.
    """
    if environment is None:
        return partial(collect, engine, keep=keep)
    return partial(
        collect_turns,
        engine,
        make_codec(policy.tokenizer),
        environment=environment,
        turns=turns,
        max_positions=policy.max_positions,
    )


def _in_lock_step(engine: Engine, environment: Bound, codec: Codec, episodes: Sequence[Episode]) -> list[Completion]:
    """All ranks run all of these: the engine divides its requests."""
    replies = Replies(environment, episodes, codec)
    for _ in range(max((e.limits.turns for e in episodes), default=0)):
        going = [e for e in episodes if not e.finish]
        for episode, (turn,) in zip(going, engine.generate([e.request() for e in going]), strict=True):
            episode.add_turn(turn)
        replies.ask([e for e in going if not e.finish])
    return [e.completion() for e in episodes]


def _freely(engine: FreeEngine, environment: Bound, codec: Codec, episodes: Sequence[Episode]) -> list[Completion]:
    """This rank runs its share of episodes to their ends."""
    run_freely(engine, Replies(environment, episodes, codec), episodes)
    return [e.completion() for e in episodes]


def _report(environment: Bound, done: Sequence[Completion]) -> None:
    """Say so when an environment begins to fail, and when it fails no more."""
    failed = sum(c.finish == FAILED for c in done)
    if failed:
        environment.failing.begins(f"environment: it failed, and episodes are unscored: {failed} of {len(done)}")
    else:
        environment.failing.ends("environment: it fails no more")
