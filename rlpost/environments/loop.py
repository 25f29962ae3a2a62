"""Episodes of several turns: the model writes, an environment replies, until one of them ends the episode.

An environment is a function (text of the model's last turn, its turns so far, the row) -> its reply as text, or None
when the episode is over. Replies become part of the completion as tokens that are not actions: the model reads them,
and nothing is learned from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from rlpost.data.codec import Codec, make_codec
from rlpost.engine.api import Engine
from rlpost.engine.collect import collect
from rlpost.engine.params import Sampling
from rlpost.engine.seeds import prompt_seeds
from rlpost.errors import RewardError, RlpostError
from rlpost.policy.policy import Policy
from rlpost.types import FAILED, Completion, Group, Request
from rlpost.usercode.bound import Bound
from rlpost.usercode.calls import CallError, Failed, Remote


@dataclass
class _Episode:
    """One completion as it grows."""

    group: Group
    seed: int
    ids: list[int] = field(default_factory=list)
    action: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    finish: str = ""
    weights_version: int | None = None

    def request(self, sampling: Sampling, turn: int, max_positions: int, keep: bool) -> Request:
        """The engine request for the model's next turn, which may use all remaining tokens."""
        prompt = np.concatenate([self.group.prompt, np.array(self.ids, np.int32)])
        room = min(sampling.max_new_tokens - len(self.ids), max_positions - len(prompt))
        return Request(prompt, 1, sampling, prompt_seeds(self.seed, turn, 1)[0], limit=room, keep=keep)

    def add_turn(self, turn: Completion) -> None:
        """Append the model's turn."""
        self.weights_version = turn.weights_version
        self.ids += turn.ids.tolist()
        self.action += turn.action.tolist()
        self.logprobs += turn.logprobs.tolist()
        self.turns.append(turn.text)

    def add_reply(self, ids: Sequence[int]) -> None:
        """Append the environment's reply."""
        self.ids += ids
        self.action += [False] * len(ids)

    def completion(self) -> Completion:
        """The whole episode as a completion; its text, which rewards read, is the last turn's."""
        text = self.turns[-1] if self.turns else ""
        return Completion(self.ids, self.action, text, self.finish, self.logprobs, weights_version=self.weights_version)


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
    """
    seeds = prompt_seeds(seed, first, len(groups))
    episodes = [
        _Episode(group, episode_seed)
        for group, prompt_seed in zip(groups, seeds, strict=True)
        for episode_seed in prompt_seeds(prompt_seed, 0, n)
    ]
    for turn in range(turns):
        going = [e for e in episodes if not e.finish]
        last = turn + 1 == turns
        requests = [e.request(sampling, turn, max_positions, keep=not last) for e in going]
        sampled = engine.generate(requests)
        for episode, (completion,) in zip(going, sampled, strict=True):
            episode.add_turn(completion)
        asking = [e for e, (c,) in zip(going, sampled, strict=True) if not _ended(e, c, last)]
        for episode, reply in _replies(environment, asking, episodes):
            _add_reply(episode, reply, codec, sampling.max_new_tokens, max_positions)
    found = iter(episodes)
    return [replace(g, completions=tuple(next(found).completion() for _ in range(n))) for g in groups]


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


def _ended(episode: _Episode, turn: Completion, last: bool) -> bool:
    """Whether the model's turn ended the episode."""
    if turn.finish == "length" or last:
        episode.finish = turn.finish
    return bool(episode.finish)


def _add_reply(episode: _Episode, reply: str | None, codec: Codec, limit: int, max_positions: int) -> None:
    """Append the environment's reply, or end the episode."""
    if reply is None:
        episode.finish = "stop"
        return
    ids = codec.ids(reply, "the environment's reply")
    used = len(episode.ids) + len(ids)
    # The next turn needs room for at least one token.
    if used >= limit or len(episode.group.prompt) + used >= max_positions:
        episode.finish = "length"
        return
    episode.add_reply(ids)


def _replies(
    environment: Bound, asking: Sequence[_Episode], every: Sequence[_Episode]
) -> Iterator[tuple[_Episode, str | None]]:
    """(episode, reply) for each episode whose environment did not fail.

    An environment may hold state of an episode: if its process dies, all episodes it has replied to fail.

    Raises:
        RewardError: it failed, or returned no text, and its failures stop the run.
    """
    for episode, found in zip(asking, _call_all(environment, asking), strict=False):
        wrong = _wrong(found, episode)
        if wrong and not environment.unscored:
            raise RewardError(f"environment: {wrong}") from getattr(found, "error", None)
        if wrong:
            episode.finish = FAILED
        if isinstance(found, Failed) and found.gone:
            for other in every:
                if not other.finish and not all(other.action):
                    other.finish = FAILED
        if not episode.finish:
            yield episode, found
    failed = sum(e.finish == FAILED for e in every)
    if not failed:
        environment.failing.ends("environment: it fails no more")
    else:
        environment.failing.begins(f"environment: it failed, and episodes are unscored: {failed} of {len(every)}")


def _call_all(environment: Bound, asking: Sequence[_Episode]) -> Iterable[Any]:
    """What the environment returned for each, or a Failed; it stops at the first failure if failures stop the run."""
    names = inspect.signature(environment).parameters
    calls = []
    for e in asking:
        supplied = {"text": e.turns[-1], "turns": list(e.turns), "example": e.group.example}
        calls.append({name: value for name, value in supplied.items() if name in names})
    if isinstance(environment.call, Remote):
        try:
            return environment.call.each(calls, keep_going=environment.unscored)
        except CallError as error:
            raise RewardError(f"environment: {error}") from error
    return (_call_here(environment.call, call) for call in calls)


def _call_here(environment: Callable[..., Any], call: dict[str, Any]) -> Any:
    try:
        return environment(**{n: dict(value) if n == "example" else value for n, value in call.items()})
    except RlpostError:
        raise
    except (Exception, SystemExit) as error:
        return Failed(f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}", error)


def _wrong(found: Any, episode: _Episode) -> str:
    if isinstance(found, Failed):
        remedy = "mend the function, or let it return None to end the episode"
        slow = "; raise its `deadline`" if found.reason.startswith("ran for") else ""
        return f"{found.reason}, on the turn {episode.turns[-1][:60]!r}; {remedy}{slow}"
    if found is not None and not isinstance(found, str):
        return f"returned {type(found).__name__}; return text, or None to end the episode"
    return ""
