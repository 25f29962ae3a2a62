"""The replies of an environment that is a function: asked for alone or together, and what becomes of failures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlpost.data.codec import Codec
from rlpost.environments.episode import Episode
from rlpost.errors import RewardError, RlpostError
from rlpost.usercode.bound import Bound
from rlpost.usercode.calls import GIVE_UP, CallError, Failed, Remote, Reply, untried


class Replies:
    """The replies of one function to some episodes.

    It may hold state of an episode: if its process dies, all unfinished episodes it has replied to fail.
    """

    def __init__(self, environment: Bound, episodes: Sequence[Episode], codec: Codec) -> None:
        """Of `environment` to all `episodes`; `codec` tokenises them."""
        self._environment = environment
        self._takes = inspect.signature(environment).parameters
        self._episodes = episodes
        self._codec = codec
        self._lost: set[int] = set()
        """Lives of processes that were lost."""
        self._in_a_row: set[int] = set()
        """Those lost since the last reply."""

    def begin(self, episodes: Sequence[Episode]) -> None:
        """They begin with the rows' prompts."""

    def end(self, episodes: Sequence[Episode]) -> None:
        """Nothing is kept of them here."""

    def ask(self, episodes: Sequence[Episode]) -> None:
        """Add a reply to each of these, or end it; there is none to the last turn.

        Raises:
            RewardError: the environment failed, or did not reply with text, and its failures stop the run.
        """
        going = [episode for episode in episodes if not self._over(episode)]
        for episode, reply in zip(going, self._each(going), strict=False):
            self._settle(episode, reply)

    async def ask_one(self, episode: Episode) -> None:
        """The same for one of many that are under way."""
        if not self._over(episode):
            self._settle(episode, await self._once(episode))

    def _over(self, episode: Episode) -> bool:
        """Whether the model has had its last turn, which ends the episode."""
        if episode.at_limit:
            episode.finish = "stop"
        return episode.at_limit

    def _each(self, episodes: Sequence[Episode]) -> Iterable[Reply]:
        """In order; up to the first failure if failures stop the run."""
        remote, calls = self._environment.call, [self._arguments(e) for e in episodes]
        if not isinstance(remote, Remote):
            return (Reply(call_here(remote, call)) for call in calls)
        seeds, lives = [e.next_seed for e in episodes], [e.life for e in episodes]
        try:
            return remote.seeded(calls, seeds, lives, keep_going=self._environment.unscored)
        except CallError as error:
            raise RewardError(f"environment: {error}") from error

    async def _once(self, episode: Episode) -> Reply:
        remote, call = self._environment.call, self._arguments(episode)
        if not isinstance(remote, Remote):
            return Reply(call_here(remote, call))
        try:
            while len(self._in_a_row) < GIVE_UP:
                if reply := await remote.once(call, episode.next_seed, episode.life):
                    return reply
        except CallError as error:
            raise RewardError(f"environment: {error}") from error
        return untried(GIVE_UP)

    def _arguments(self, episode: Episode) -> dict[str, Any]:
        return {name: value for name, value in episode.arguments().items() if name in self._takes}

    def _settle(self, episode: Episode, reply: Reply) -> None:
        """Add a reply, or end the episode; with it those that were lost with their process."""
        if wrong := _wrong(reply.found, episode):
            if not self._environment.unscored:
                raise RewardError(f"environment: {wrong}") from getattr(reply.found, "error", None)
            episode.fail()
        if not reply.gone:
            self._in_a_row.clear()
        if reply.gone and reply.life is not None:
            self._lost.add(reply.life)
            self._in_a_row.add(reply.life)
            for other in self._episodes:
                if other.life == reply.life:
                    other.fail()
        if episode.finish:
            return
        episode.life = reply.life
        episode.add_reply(reply.found, self._codec)
        if reply.life in self._lost:  # it had replied before it was lost
            episode.fail()


def call_here(environment: Callable[..., Any], call: dict[str, Any]) -> Any:
    """What a function of rlpost returns in this process, or a Failed."""
    try:
        return environment(**{n: dict(value) if n == "example" else value for n, value in call.items()})
    except RlpostError:
        raise
    except (Exception, SystemExit) as error:
        return Failed(f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}", error)


def _wrong(found: Any, episode: Episode) -> str:
    if isinstance(found, Failed):
        remedy = "mend the function, or let it return None to end the episode"
        slow = "; raise its `deadline`" if found.reason.startswith("ran for") else ""
        return f"{found.reason}, on the turn {episode.turns[-1][:60]!r}; {remedy}{slow}"
    if found is not None and not isinstance(found, str):
        return f"returned {type(found).__name__}; return text, or None to end the episode"
    return ""
