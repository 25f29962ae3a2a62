"""What a chat template writes between a turn of the model and its next one: its end, what others say, a new beginning.

The tokens of the model's turns stay those that were sampled; they are never rendered again. What stands between them is
cut out of the rendered conversation: it begins where the template ends the turn, which is found by a word that is put
into the turn. So the tokens that are trained are the tokens that were read and written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost import console
from rlpost.data.chat import Template, text_of
from rlpost.data.messages import Message
from rlpost.data.templates import REMEDY, Job, Talk, render_all
from rlpost.data.tool_calls import Arguments, formed, wanted_form
from rlpost.errors import DataError, ModelError

_WORD = "qxturnqx"
"""Nothing that a template writes, and one that no template changes."""
_THOUGHT = "<think>t</think>b"
"""A turn with reasoning, as several families of models write it."""


@dataclass(frozen=True)
class Between:
    """A place in a conversation between two turns of the model."""

    before: Sequence[Message]
    """The conversation up to the model's turn, which is the last of these."""
    said: Sequence[Message]
    """What follows it."""
    tools: Sequence[Any] | None = None


class TurnDelta:
    """The turn delta of a chat template.

    Raises:
        ModelError: it cannot be found in what the template renders.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self._tokenizer = tokenizer
        self._stop = template.stop
        self._stop_id = template.stop_id
        self._special = _special(tokenizer, template)
        self._prove()

    def texts(self, places: Sequence[Between]) -> list[str]:
        """[B] the text after each turn's stop token, up to where the model's next turn begins.

        Raises:
            DataError: the template fails on one, or does not render the turn.
        """
        location = "an episode"
        forms = [wanted_form(self._tokenizer, Talk(place.before, place.tools), location) for place in places]
        jobs = [_marked(place, form, in_call=False) for place, form in zip(places, forms, strict=True)]
        texts = [text_of(r, location) for r in render_all(self._tokenizer, jobs, location)]
        # A template may leave out what is said beside a call.
        again = [i for i, text in enumerate(texts) if _WORD not in text and places[i].before[-1].get("tool_calls")]
        more = [_marked(places[i], forms[i], in_call=True) for i in again]
        for i, rendered in zip(again, render_all(self._tokenizer, more, location), strict=True):
            texts[i] = text_of(rendered, location)
        return [self._after(text, location) for text in texts]

    def end_of(self, ids: Sequence[int]) -> str:
        """The text that ends a turn of these tokens, if they do not end with the template's stop token."""
        return "" if ids and ids[-1] == self._stop_id else self._stop

    def forged(self, text: str) -> str | None:
        """A special token that a text holds by name, so that it would be read as one; None if it holds none."""
        return next((token for token in self._special if token in text), None)

    def _after(self, text: str, location: str) -> str:
        at = text.rfind(_WORD)
        end = text.find(self._stop, at)
        if at < 0 or end < 0:
            raise DataError(f"{location}: the chat template leaves out a turn of the model, or its end: {REMEDY}")
        return text[end + len(self._stop) :]

    def _prove(self) -> None:
        """Refuse a template whose delta is not what it writes between a turn and the next."""
        location = "chat template"
        user, turn, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, "c"
        said = [{"role": "user", "content": reply}]
        talk = Talk([user, turn, *said])
        thought = Talk([user, {**turn, "content": _THOUGHT}, *said])
        jobs = [Job(talk, 1, True), Job(talk, 3, True), Job(thought, 3, True)]
        start, whole, thoughtful = (
            text_of(r, location, ModelError) for r in render_all(self._tokenizer, jobs, location)
        )
        try:
            (delta,) = self.texts([Between([user, turn], said)])
        except DataError as error:
            raise ModelError(str(error)) from error
        if reply not in delta or not whole.endswith(self._stop + delta):
            raise ModelError(
                f"{location}: what it writes after a turn of the assistant depends on the turn, so episodes of "
                f"several turns cannot be continued by it: {REMEDY}"
            )
        end = f"b{self._stop}{delta}"
        as_written = whole.startswith(start) and not whole[len(start) : -len(end)].strip() and _THOUGHT in thoughtful
        if not as_written:
            console.warn(
                f"{location}: renders an earlier turn of the assistant otherwise than it is generated; in episodes the "
                "model reads its turns as it wrote them"
            )


def _marked(place: Between, form: Arguments, *, in_call: bool) -> Job:
    """The rendering of a place with the word in the model's turn."""
    *before, turn = place.before
    marked = _with_marked_call(turn) if in_call else {**turn, "content": _WORD}
    messages = [*before, marked, *place.said]
    return Job(formed(Talk(messages, place.tools), form), len(messages), generation=True)


def _with_marked_call(turn: Message) -> Message:
    *others, call = turn["tool_calls"]
    function = {**call["function"], "arguments": {**call["function"]["arguments"], _WORD: _WORD}}
    return {**turn, "tool_calls": [*others, {**call, "function": function}]}


def _special(tokenizer: Any, template: Template) -> tuple[str, ...]:
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    named = {token.content for token in added.values() if token.special}
    return tuple(sorted({template.stop, *named, *tokenizer.all_special_tokens}, key=len, reverse=True))
