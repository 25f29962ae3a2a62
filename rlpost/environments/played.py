"""An environment that is a class: its conversations with the model, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from rlpost.data import encoders
from rlpost.data.codec import Codec
from rlpost.data.messages import Message, opening, validate
from rlpost.engine.seeds import prompt_seeds
from rlpost.environments.delta import Between, TurnDelta
from rlpost.environments.episode import Episode
from rlpost.environments.replies import call_here
from rlpost.errors import DataError, ModelError, RewardError
from rlpost.types import Group, Tokens
from rlpost.usercode.bound import Bound
from rlpost.usercode.calls import GIVE_UP, CallError, Failed, Remote, Reply, untried
from rlpost.usercode.episodes import OTHER, POLICY
from rlpost.usercode.params import EPISODE

_keys = count()
_TRIES = 3
"""Calls of one step by coroutine functions whose process was lost, perhaps by another of them."""


@dataclass(frozen=True)
class Asked:
    """What an opponent is asked."""

    prompt: Tokens
    seed: int
    """Of its random numbers, and of who it is."""
    prompt_seed: int
    """The same for all episodes of a prompt."""


class Opponents(Protocol):
    """Those who play against the model."""

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """[A] the text of each one's turn."""
        ...


@dataclass(eq=False)
class _State:
    """An episode as its environment knows it."""

    key: str = field(default_factory=lambda: str(next(_keys)))
    opening: Sequence[Message] | None = None
    """The messages of its prompt; None where that is plain text."""
    actions: list[tuple[str, str]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    begun: bool = False
    """`reset` was called for it, and not only for another of its prompt."""
    ended: bool = False
    """The environment keeps nothing of it."""


class Played:
    """What a class environment replies to some episodes."""

    def __init__(
        self, environment: Bound, codec: Codec, delta: TurnDelta | None, longest: int, opponents: Opponents | None
    ) -> None:
        """Reply by `environment`; nothing is called yet.

        Args:
            environment: a class as a function (rlpost/usercode/episodes.py).
            codec: tokenises what it says.
            delta: of the model's chat template; None if it has none.
            longest: tokens that a prompt may have.
            opponents: play its second player.
        """
        self._environment = environment
        self._codec = codec
        self._delta = delta
        self._longest = longest
        self._opponents = opponents
        self._states: dict[Episode, _State] = {}
        self._alone = asyncio.Lock()

    def begin(self, episodes: Sequence[Episode]) -> None:
        """Give episodes their prompts: `reset` is called for one of each prompt's; a difference to it is found later.

        Raises:
            RewardError: it failed, and its failures stop the run.
        """
        prompts: dict[int, list[Episode]] = {}
        for episode in episodes:
            self._states[episode] = _State()
            prompts.setdefault(episode.prompt_seed, []).append(episode)
        firsts = [some[0] for some in prompts.values()]
        for some, reply in zip(prompts.values(), self._each(firsts), strict=False):
            self._states[some[0]].begun = True
            wrong = _failure(reply) or self._begun(some, reply.found)
            if wrong:
                self._failed(some, f"{wrong}, at the start of an episode", reply)

    def ask(self, episodes: Sequence[Episode]) -> None:
        """Take the episodes a turn of the model on: replies are added, or end them.

        Raises:
            RewardError: the environment failed, and its failures stop the run.
        """
        going = list(episodes)
        for episode in going:
            self._states[episode].actions.append((POLICY, episode.turns[-1]))
        replied: list[tuple[Episode, Mapping[str, Any]]] = []
        while going:
            asking: list[tuple[Episode, Asked]] = []
            for episode, reply in zip(going, self._each(going), strict=False):
                if (asked := self._taken(episode, reply)) is not None:
                    asking.append((episode, asked))
                elif not episode.finish:
                    replied.append((episode, reply.found))
            texts = self._opponents.answer([asked for _, asked in asking]) if self._opponents and asking else []
            going = [episode for episode, _ in asking]
            for episode, text in zip(going, texts, strict=True):
                self._heard(episode, text)
        self._say(replied)

    async def ask_one(self, episode: Episode) -> None:
        """The same for one of many that are under way."""
        self._states[episode].actions.append((POLICY, episode.turns[-1]))
        reply = await self._once(episode)
        while (asked := self._taken(episode, reply)) is not None:
            assert self._opponents is not None, "else nothing is asked"
            self._heard(episode, *self._opponents.answer([asked]))
            reply = await self._once(episode)
        if not episode.finish:
            self._say([(episode, reply.found)])

    def end(self, episodes: Sequence[Episode]) -> None:
        """Close what the environment keeps of these.

        Raises:
            RewardError: its `close` failed, and its failures stop the run.
        """
        states = self._states
        kept = [e for e in episodes if not states[e].ended and (states[e].actions or states[e].begun)]
        calls = [{EPISODE: {"key": self._states[e].key, "close": True}} for e in kept]
        for episode, reply in zip(kept, self._calls(calls, kept), strict=False):
            self._states[episode].ended = True
            if wrong := _failure(reply):
                self._failed([], wrong, reply)

    def _begun(self, episodes: Sequence[Episode], reply: Mapping[str, Any]) -> str:
        """Give the episodes of a prompt the prompt that `reset` replied with; what is wrong with it, if anything."""
        row, said = episodes[0].group.example, reply["messages"]
        location = "what reset returned"
        try:
            messages = opening_of(row) if said is None else None if isinstance(said, str) else validate(said, location)
            prompt: Tokens = episodes[0].group.prompt
            if said is not None:
                prompt = self._ids(row, messages or said, location)
        except (DataError, ModelError) as error:
            return str(error)
        if len(prompt) > self._longest:
            return f"{location} has {len(prompt)} tokens, and a prompt has room for {self._longest}; shorten it"
        for episode in episodes:
            state = self._states[episode]
            state.opening = messages
            state.digests.append(reply["digest"])
            episode.group = Group(prompt, (), row)
        return ""

    def _taken(self, episode: Episode, reply: Reply) -> Asked | None:
        """Note what the environment replied, and end the episode where it does; what its opponent is asked, if so."""
        state = self._states[episode]
        if wrong := _failure(reply):
            state.ended = True
            self._failed([episode], f"{wrong}, on the turn {episode.turns[-1][:60]!r}", reply)
            return None
        found = reply.found
        state.digests.append(found["digest"])
        episode.note(found["reward"], found["info"])
        if found["terminated"] or found["truncated"]:
            state.ended = True
            episode.messages += _as_messages(found["messages"])
            episode.finish = "stop" if found["terminated"] else "length"
            return None
        if found["asks"] is None:
            return None
        if self._opponents is None:
            raise RewardError(
                f"{self._environment.where}: {self._environment.name} asks an opponent, and there is none - name "
                "`opponents`, or let the environment play itself"
            )
        seed = prompt_seeds(episode.seed, len(state.actions), 1)[0]
        row = {"tools": None}
        try:
            asks = found["asks"] if isinstance(found["asks"], str) else validate(found["asks"], "what other returned")
            return Asked(self._ids(row, asks, "what other returned"), seed, episode.prompt_seed)
        except (DataError, ModelError) as error:
            state.ended = True
            self._failed([episode], str(error), reply)
            return None

    def _heard(self, episode: Episode, text: str) -> None:
        self._states[episode].actions.append((OTHER, text))
        episode.messages.append({"role": "opponent", "content": text})

    def _say(self, replied: Sequence[tuple[Episode, Mapping[str, Any]]]) -> None:
        """Append replies to their episodes, as text or through the chat template's turn delta."""
        by_template: list[Episode] = []
        for episode, reply in replied:
            said = reply["messages"]
            if episode.at_limit:
                episode.messages += _as_messages(said)
                episode.finish = "length"
                continue
            if wrong := "" if isinstance(said, str) else self._wrong(episode, said):
                self._failed([episode], wrong, Reply(None))
            elif isinstance(said, str):
                episode.messages.append({"role": "environment", "content": said})
                self._add(episode, said)
            else:
                episode.messages += said
                by_template.append(episode)
        if self._delta is not None and by_template:
            for episode, text in zip(by_template, self._between(by_template), strict=True):
                if not episode.finish:
                    self._add(episode, self._delta.end_of(episode.ids) + text)

    def _between(self, episodes: Sequence[Episode]) -> list[str]:
        """What the template writes after each one's last turn; one that it fails on has failed."""
        assert self._delta is not None, "messages were said"
        try:
            return self._delta.texts([self._place(e) for e in episodes])
        except DataError as error:
            if len(episodes) > 1:
                return [text for e in episodes for text in self._between([e])]
            self._failed(episodes, str(error), Reply(None))
            return [""]

    def _add(self, episode: Episode, text: str) -> None:
        try:
            episode.add_ids(self._codec.ids(text, "what step returned"))
        except DataError as error:
            self._failed([episode], str(error), Reply(None))

    def _place(self, episode: Episode) -> Between:
        last = max(i for i, m in enumerate(episode.messages) if m["role"] == "assistant")
        said = [m for m in episode.messages if m["role"] != "opponent"]
        last -= sum(m["role"] == "opponent" for m in episode.messages[:last])
        plain = [{k: v for k, v in m.items() if k not in ("reward", "info")} for m in said]
        return Between([*(self._states[episode].opening or ()), *plain[: last + 1]], plain[last + 1 :])

    def _wrong(self, episode: Episode, said: Any) -> str:
        """What is wrong with messages that an episode is to go on with."""
        if not said:
            return "it returned no messages, though the episode goes on; return some, or terminated=True"
        if self._delta is None:
            return "it returned messages, and the model has no chat template; return text, or set model.chat_template"
        if self._states[episode].opening is None:
            return "it returned messages, and the prompt is plain text; return text, or begin with messages"
        try:
            for message in validate(said, "what step returned"):
                if message["role"] == "assistant":
                    return "it returned a message of the assistant, which is the model; return what others say"
                if token := self._delta.forged(message["content"]):
                    return f"its message holds the special token {token!r}; take it out"
        except DataError as error:
            return str(error)
        return ""

    def _ids(self, row: Mapping[str, Any], said: str | Sequence[Message], location: str) -> tuple[int, ...]:
        if isinstance(said, str):
            return encoders.plain_prompt(said, self._codec, location)
        return encoders.conversation_prompt(row, list(said), self._codec, location)

    def _failed(self, episodes: Sequence[Episode], wrong: str, reply: Reply) -> None:
        if not self._environment.unscored:
            slow = "; raise its `deadline`" if wrong.startswith("ran for") else ""
            raise RewardError(f"environment: {wrong}{slow}") from getattr(reply.found, "error", None)
        for episode in episodes:
            episode.fail()

    def _call(self, episode: Episode) -> dict[str, Any]:
        state = self._states[episode]
        seeds = [episode.prompt_seed, *prompt_seeds(episode.seed, 1, len(state.actions))]
        known = {"key": state.key, "example": dict(episode.group.example), "seeds": seeds}
        return {EPISODE: known | {"actions": [list(a) for a in state.actions], "digests": list(state.digests)}}

    def _each(self, episodes: Sequence[Episode]) -> Sequence[Reply]:
        return self._calls([self._call(e) for e in episodes], episodes)

    def _calls(self, calls: Sequence[dict[str, Any]], episodes: Sequence[Episode]) -> Sequence[Reply]:
        """The replies, in order; up to the first failure if failures stop the run."""
        remote, going_on = self._environment.call, self._environment.unscored
        if not isinstance(remote, Remote):
            return [Reply(call_here(remote, call)) for call in calls]
        seeds = [e.next_seed for e in episodes]
        try:
            found = remote.seeded(calls, seeds, [None] * len(calls), keep_going=going_on or remote.together)
            for i, reply in enumerate(found):
                if remote.together and reply.gone and not _took_too_long(reply):  # by another's call, perhaps
                    (found[i],) = remote.seeded([calls[i]], [seeds[i]], [None])
        except CallError as error:
            raise RewardError(f"environment: {error}") from error
        return found

    async def _once(self, episode: Episode) -> Reply:
        remote, call = self._environment.call, self._call(episode)
        if not isinstance(remote, Remote):
            return Reply(call_here(remote, call))
        try:
            reply = await self._tried(remote, call, episode)
            for _ in range(_TRIES - 1):
                if not (remote.together and reply.gone) or _took_too_long(reply):
                    break
                async with self._alone:  # those that lose it must not lose it for each other for ever
                    reply = await self._tried(remote, call, episode)
        except CallError as error:
            raise RewardError(f"environment: {error}") from error
        return reply

    async def _tried(self, remote: Remote, call: dict[str, Any], episode: Episode) -> Reply:
        for _ in range(GIVE_UP):
            if reply := await remote.once(call, episode.next_seed, None):
                return reply
        return untried(GIVE_UP)


def _failure(reply: Reply) -> str:
    return reply.found.reason if isinstance(reply.found, Failed) else ""


def _took_too_long(reply: Reply) -> bool:
    return _failure(reply).startswith("ran for")


def opening_of(row: Mapping[str, Any]) -> list[Message] | None:
    """The messages of a row's own prompt; None if it is plain text."""
    for column in ("prompt", "messages"):
        value = row.get(column)
        if isinstance(value, list | tuple):
            return list(opening(validate(value, f"its {column}")))
    return None


def _as_messages(said: Any) -> list[dict[str, Any]]:
    return [{"role": "environment", "content": said}] if isinstance(said, str) else [dict(m) for m in said or ()]
