"""Checks that a chat template renders all of a conversation.

A unique word is appended to every text of the conversation, and the words are searched for in the rendered text. A
value that cannot be marked so, or whose word is missing, is changed alone: if the rendered text stays the same, the
template leaves the value out. This needs no list of the keys that a template knows.

An earlier turn of the assistant counts as rendered if it was when it was the last one: templates remove reasoning from
earlier turns, in generation as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rlpost.data.leaves import Leaf, Sort, changed, kind_of, leaves, location_of
from rlpost.data.templates import Job, Rendered, Talk, render_all
from rlpost.data.tool_calls import Arguments, formed
from rlpost.errors import DataError


class Unrendered(DataError):
    """The chat template leaves out a part of a row."""

    def __init__(self, location: str, left_out: str, remedy: str) -> None:
        super().__init__(f"{location}: {left_out}: {remedy}, or set its source's unrendered=drop")
        self.left_out = left_out


class Proof:
    """The check of one conversation, in two steps, so that its first rendering can be batched with others."""

    def __init__(self, talk: Talk, form: Arguments, generation: bool) -> None:
        """Mark every text.

        Args:
            talk: the conversation.
            form: of tool calls' arguments.
            generation: it is rendered with its generation prompt.
        """
        self._talk = talk
        self._form = form
        self._generation = generation
        self._leaves = leaves(talk)
        self._word = {leaf: f"{_WORD[:-1]}{i}e" for i, leaf in enumerate(self._leaves) if _is_markable(leaf)}
        texts = {leaf.path: leaf.value + word for leaf, word in self._word.items() if leaf.sort is Sort.words}
        keys = {leaf.path: leaf.value + word for leaf, word in self._word.items() if leaf.sort is Sort.chosen}
        self._marked = formed(changed(talk, texts, keys), form)

    @property
    def job(self) -> Job:
        """The rendering of the marked conversation."""
        return Job(self._marked, len(self._talk.messages), self._generation)

    def left_out(self, tokenizer: Any, plain: Rendered, marked: Rendered, location: str) -> str | None:
        """What the template leaves out, in words, or None.

        Args:
            tokenizer: has the template.
            plain: the conversation rendered.
            marked: `job` rendered.
            location: for messages.
        """
        unsure = [leaf for leaf in self._leaves if leaf not in self._word or self._word[leaf] not in marked.text]
        unsure = [leaf for leaf in unsure if not self._repeats_a_call(leaf)]
        for leaf in self._not_when_last(tokenizer, unsure, location):
            if not self._matters(tokenizer, leaf, plain, location):
                return location_of(leaf, self._talk.messages)
        squeezed_text = squeezed(plain.text)
        for leaf in self._leaves:
            if self._is_context(leaf) and not holds(squeezed_text, leaf.value):
                half = len(leaf.value) // 2
                for other in (f"{_WORD}{leaf.value}", f"{leaf.value[:half]}{_WORD}{leaf.value[half:]}"):
                    if not self._differs(tokenizer, changed(self._talk, {leaf.path: other}, {}), plain, location):
                        return f"a part of {location_of(leaf, self._talk.messages)}"
        return None

    def _is_context(self, leaf: Leaf) -> bool:
        """Whether it is the content of a turn that is not the assistant's."""
        if leaf.path[0] != "messages" or leaf.path[2:] != ("content",):
            return False
        return bool(self._talk.messages[int(leaf.path[1])]["role"] != "assistant")

    def _repeats_a_call(self, leaf: Leaf) -> bool:
        """Whether it is the name on a tool's answer, which repeats the call's."""
        root, *rest = leaf.path
        messages = self._talk.messages
        if root != "messages" or rest[1:] != ["name"] or messages[int(rest[0])]["role"] != "tool":
            return False
        calls = [call for m in messages[: int(rest[0])] for call in m.get("tool_calls") or ()]
        return leaf.value in [call.get("function", call)["name"] for call in calls]

    def _not_when_last(self, tokenizer: Any, unsure: Sequence[Leaf], location: str) -> Iterator[Leaf]:
        """The leaves without those of earlier assistant turns that are rendered when the turn is the last."""
        turn_of = {leaf: self._earlier_turn(leaf) for leaf in unsure if leaf in self._word}
        turns = sorted({turn for turn in turn_of.values() if turn is not None})
        rendered = render_all(tokenizer, [Job(self._marked, i + 1) for i in turns], location) if turns else []
        text = dict(zip(turns, (r.text for r in rendered), strict=True))
        for leaf in unsure:
            turn = turn_of.get(leaf)
            if turn is None or self._word[leaf] not in text[turn]:
                yield leaf

    def _earlier_turn(self, leaf: Leaf) -> int | None:
        if leaf.path[0] != "messages":
            return None
        i, messages = int(leaf.path[1]), self._talk.messages
        return i if messages[i]["role"] == "assistant" and i + 1 < len(messages) else None

    def _matters(self, tokenizer: Any, leaf: Leaf, plain: Rendered, location: str) -> bool:
        """Whether another value changes the text; cached for values that a template treats alike."""
        alike = leaf.sort is not Sort.words or leaf.path[0] == "tools"
        key = (str(tokenizer.chat_template), kind_of(leaf, self._talk.messages)) if alike else None
        if key is not None and key in _MATTERS:
            return _MATTERS[key]
        other = self._with_another(leaf)
        matters = self._differs(tokenizer, other, plain, location)
        turn = self._earlier_turn(leaf)
        if not matters and turn is not None:
            jobs = [Job(formed(talk, self._form), turn + 1) for talk in (self._talk, other)]
            before, after = render_all(tokenizer, jobs, location)
            matters = before != after
        if key is not None:
            _MATTERS[key] = matters
        return matters

    def _differs(self, tokenizer: Any, other: Talk, plain: Rendered, location: str) -> bool:
        job = Job(formed(other, self._form), len(self._talk.messages), self._generation)
        (found,) = render_all(tokenizer, [job], location)
        return found != plain

    def _with_another(self, leaf: Leaf) -> Talk:
        if leaf.sort is Sort.chosen:
            return changed(self._talk, {}, {leaf.path: f"{leaf.value}{_WORD}"})
        if isinstance(leaf.value, bool):
            return changed(self._talk, {leaf.path: not leaf.value}, {})
        other = leaf.value + 1 if isinstance(leaf.value, int | float) else f"{leaf.value}{_WORD}"
        return changed(self._talk, {leaf.path: other}, {})


def squeezed(text: str) -> str:
    """The text without white space: templates strip contents and put reasoning on separate lines."""
    return "".join(text.split())


def holds(text: str, part: str) -> bool:
    """Whether a squeezed text contains another text, literally or as JSON."""
    spelled = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return any(squeezed(form) in text for form in (part, *spelled))


_WORD = "zq7fe"
"""A word that no text contains."""
_MATTERS: dict[tuple[Any, ...], bool] = {}


def _is_markable(leaf: Leaf) -> bool:
    """Whether a word can be appended to it; not to a parameter's name, which is in `required` too."""
    return leaf.sort is Sort.words or (leaf.sort is Sort.chosen and leaf.path[0] == "messages")
