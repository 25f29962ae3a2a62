"""Episodes of several turns: the model writes, an environment replies, until one of them ends the episode.

An environment is a function (text of the model's last turn, its turns so far, the row) -> its reply as text, or None
when the episode is over; or a class with `reset` and `step`, which speaks in messages and rewards each turn. What it
says becomes part of the completion as tokens that are not actions: the model reads them, and learns nothing of them
unless a stage asks for their likelihood too (`reply_coef`).

Episodes run in lock-step, all of them a turn at a time; an engine that takes requests while it works on others runs
each by itself. Requests and seeds are the same.
"""

from __future__ import annotations

import inspect
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
from rlpost.environments.called import Called
from rlpost.environments.delta import TurnDelta
from rlpost.environments.episode import Episode, Limits
from rlpost.environments.free import run_freely
from rlpost.environments.played import Opponents, Played
from rlpost.environments.replies import Replies
from rlpost.environments.responder import Responder
from rlpost.environments.tools import Toolbox, format_of
from rlpost.policy.policy import Policy
from rlpost.types import FAILED, Completion, Group
from rlpost.usercode.bound import Bound
from rlpost.usercode.params import EPISODE
from rlpost.usercode.toolset import Tool


def collect_turns(
    engine: Engine,
    codec: Codec,
    groups: Sequence[Group],
    n: int,
    sampling: Sampling,
    seed: int,
    first: int = 0,
    *,
    environment: Bound | Toolbox,
    turns: int,
    max_positions: int,
    longest: int | None = None,
    delta: TurnDelta | None = None,
    opponents: Opponents | None = None,
) -> list[Group]:
    """The groups with `n` episodes each, in place of what completions they had.

    Args:
        engine: samples; the caller has updated its weights.
        codec: tokenises replies.
        groups: prompts with their rows.
        n: episodes a prompt.
        sampling: `max_new_tokens` holds for a whole episode, replies included.
        seed: of random numbers. An episode depends on its prompt's seed, its index and its turns.
        first: number of the first prompt.
        environment: the function or class that replies, or tools that the model calls.
        turns: most turns of the model.
        max_positions: positions of the model.
        longest: tokens that a prompt of the environment's may have; by default what the positions leave room for.
        delta: of the model's chat template, for tools and for an environment that speaks in messages.
        opponents: play the second player of an environment that has one.

    Raises:
        RewardError: the environment failed, or did not reply with text.
        EngineError: generation failed.
    """
    limits = Limits(sampling, turns, max_positions)
    seeds = prompt_seeds(seed, first, len(groups))
    episodes = [
        Episode(group, prompt_seed, episode_seed, limits)
        for group, prompt_seed in zip(groups, seeds, strict=True)
        for episode_seed in prompt_seeds(prompt_seed, 0, n)
    ]
    responder: Responder = (
        Called(environment, codec, delta)
        if isinstance(environment, Toolbox)
        else Played(environment, codec, delta, max_positions - 1 if longest is None else longest, opponents)
        if is_played(environment)
        else Replies(environment, episodes, codec)
    )
    responder.begin(episodes)
    done = _run(engine, responder, episodes)
    _report(environment, done)
    found = iter(done)
    # All episodes of a prompt begin with the prompt of the first.
    return [
        replace(e.group, completions=tuple(next(found) for _ in range(n)), example=g.example)
        for g, e in zip(groups, episodes[::n], strict=True)
    ]


def is_played(environment: Bound) -> bool:
    """Whether it is a class environment."""
    return EPISODE in inspect.signature(environment).parameters


class Collect(Protocol):
    """`collect`, or `collect_turns` with its environment."""

    def __call__(self, groups: Sequence[Group], n: int, sampling: Sampling, seed: int, first: int = 0) -> list[Group]:
        """The groups with `n` completions each."""
        ...


def collector(
    engine: Engine,
    policy: Policy,
    environment: Bound | Sequence[Tool] | None,
    turns: int,
    *,
    longest: int | None = None,
    opponents: Opponents | None = None,
    keep: bool = False,
) -> Collect:
    """How completions are collected: in one turn, or in several with an environment or tools.

    With `keep`, later prompts continue completions of one turn, so their cache is kept.

    Raises:
        ModelError: there are tools or a class, and their messages cannot go through the model's chat template.
    """
    if not environment:
        return partial(collect, engine, keep=keep)
    codec = make_codec(policy.tokenizer)
    answers: Bound | Toolbox
    if isinstance(environment, Bound):
        answers, speaks = environment, is_played(environment)
    else:
        codec = replace(codec, tools=tuple(tool.schema for tool in environment))
        answers, speaks = Toolbox(environment, codec, format_of(codec, environment[0].bound.where)), True
    return partial(
        collect_turns,
        engine,
        codec,
        environment=answers,
        turns=turns,
        max_positions=policy.max_positions,
        longest=longest,
        delta=TurnDelta(codec.tokenizer, codec.template) if speaks and codec.template else None,
        opponents=opponents,
    )


def _run(engine: Engine, responder: Responder, episodes: Sequence[Episode]) -> list[Completion]:
    if not isinstance(engine, FreeEngine):
        return _in_lock_step(engine, responder, episodes)
    costs = [len(e.group.prompt) + e.limits.sampling.max_new_tokens for e in episodes]
    return ranks.divided(episodes, costs, partial(_freely, engine, responder))


def _in_lock_step(engine: Engine, responder: Responder, episodes: Sequence[Episode]) -> list[Completion]:
    """All ranks run all of these: the engine divides its requests."""
    for _ in range(max((e.limits.turns for e in episodes), default=0)):
        going = [e for e in episodes if not e.finish]
        for episode, (turn,) in zip(going, engine.generate([e.request() for e in going]), strict=True):
            episode.add_turn(turn)
        responder.ask([e for e in going if not e.finish])
    responder.end(episodes)
    return [e.completion() for e in episodes]


def _freely(engine: FreeEngine, responder: Responder, episodes: Sequence[Episode]) -> list[Completion]:
    """This rank runs its share of episodes to their ends."""
    run_freely(engine, responder, episodes)
    responder.end(episodes)
    return [e.completion() for e in episodes]


def _report(environment: Bound | Toolbox, done: Sequence[Completion]) -> None:
    """Say so when an environment begins to fail, and when it fails no more."""
    if isinstance(environment, Toolbox):
        return  # tools end no episode
    failed = sum(c.finish == FAILED for c in done)
    if failed:
        environment.failing.begins(f"environment: it failed, and episodes are unscored: {failed} of {len(done)}")
    else:
        environment.failing.ends("environment: it fails no more")
