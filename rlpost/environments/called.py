"""Episodes in which the model calls tools: a turn without a call ends one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlpost.data.codec import Codec
from rlpost.data.messages import Message
from rlpost.data.tool_format import wire_calls
from rlpost.data.tool_text import ToolCall
from rlpost.engine.seeds import prompt_seeds
from rlpost.environments.delta import Between, TurnDelta
from rlpost.environments.episode import Episode
from rlpost.environments.played import opening_of
from rlpost.environments.tools import Asked, Toolbox
from rlpost.errors import DataError, ModelError
from rlpost.usercode.tools import Result

_RESULT = "17"
_UNSAID = ("failed", "reward", "info")
"""Keys of messages that a template does not get."""


class Called:
    """Answers the model's turns with the results of the tools that it calls."""

    def __init__(self, tools: Toolbox, codec: Codec, delta: TurnDelta | None) -> None:
        """Call `tools`; nothing is called yet.

        Args:
            tools: ready to be called.
            codec: tokenises what the model reads, and has the tools' schemas.
            delta: of the model's chat template.

        Raises:
            ModelError: the template does not write a tool's result after a turn that calls it.
        """
        assert delta is not None, "calls have the form of its template"
        self._tools = tools
        self._codec = codec
        self._delta = delta
        self._prove()

    def begin(self, episodes: Sequence[Episode]) -> None:
        """They begin with the rows' prompts."""

    def ask(self, episodes: Sequence[Episode]) -> None:
        """Add the results of what the last turns call; a turn that calls nothing ends its episode."""
        asked = [self._calls(episode) for episode in episodes]
        results = iter(self._tools.results([one for some in asked for one in some]))
        answered = [(e, [next(results) for _ in some]) for e, some in zip(episodes, asked, strict=True)]
        self._add([(episode, found) for episode, found in answered if found])

    async def ask_one(self, episode: Episode) -> None:
        """The same for one of many that are under way."""
        if asked := self._calls(episode):
            self._add([(episode, await self._tools.together(asked))])

    def end(self, episodes: Sequence[Episode]) -> None:
        """Note the calls of turns that were cut off, which nobody answers."""
        for episode in episodes:
            if episode.turns and "tool_calls" not in episode.messages[-1] and _is_models(episode.messages[-1]):
                self._read(episode)

    def _calls(self, episode: Episode) -> list[Asked]:
        """What an episode's last turn calls; where that is nothing, or no turn is left for results, it is over."""
        calls = self._read(episode)
        if not calls or episode.at_limit:
            episode.finish = "length" if calls else "stop"
            return []
        return [
            Asked(call, seed) for call, seed in zip(calls, prompt_seeds(episode.next_seed, 0, len(calls)), strict=True)
        ]

    def _read(self, episode: Episode) -> Sequence[Any]:
        """Note what the last turn says and calls."""
        turn = self._tools.form.read(episode.turns[-1])
        before = sum(len(message.get("tool_calls", ())) for message in episode.messages)
        episode.messages[-1] |= {"content": turn.content, "tool_calls": wire_calls(turn.calls, before)}
        return turn.calls

    def _add(self, answered: Sequence[tuple[Episode, Sequence[Result]]]) -> None:
        """Append results, as messages of tools through the chat template's turn delta."""
        for episode, results in answered:
            calls = episode.messages[-1]["tool_calls"]
            episode.messages += [_message(call, result) for call, result in zip(calls, results, strict=True)]
        texts = self._delta.texts([self._place(episode) for episode, _ in answered]) if answered else []
        for (episode, _), text in zip(answered, texts, strict=True):
            text = self._delta.end_of(episode.ids) + text
            episode.add_ids(self._codec.ids(text, "what stands around a tool's result"))

    def _place(self, episode: Episode) -> Between:
        last = max(i for i, message in enumerate(episode.messages) if _is_models(message))
        said = [_plain(message) for message in episode.messages]
        opening = opening_of(episode.group.example) or [{"role": "user", "content": "?"}]
        return Between([*opening, *said[: last + 1]], said[last + 1 :], self._codec.tools)

    def _prove(self) -> None:
        call = ToolCall(self._codec.tools[0]["function"]["name"], {})
        made = wire_calls([call])
        turn = {"role": "assistant", "content": "", "tool_calls": made}
        said = [_plain(_message(made[0], {"text": _RESULT, "failed": False}))]
        try:
            (text,) = self._delta.texts([Between([{"role": "user", "content": "?"}, turn], said, self._codec.tools)])
            self._codec.ids(text, "chat template: what it writes of a tool's result")
        except DataError as error:
            raise ModelError(f"{error} (in a conversation with tools)") from error
        if _RESULT not in text:
            raise ModelError(
                "chat template: it does not write a tool's result after a call: set model.chat_template=FILE.jinja "
                "that writes messages of the role tool"
            )


def _is_models(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _message(call: Message, result: Result) -> Message:
    name, number = call["function"]["name"], call["id"]
    said = {"role": "tool", "name": name, "tool_call_id": number, "content": result["text"]}
    return {**said, "failed": True} if result["failed"] else said


def _plain(message: Message) -> Message:
    """A message as a template gets it."""
    return {k: v for k, v in message.items() if k not in _UNSAID and not (k == "tool_calls" and not v)}
