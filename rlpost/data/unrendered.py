"""Proof that all a conversation says is in the text that its chat template makes of it.

Every text in the conversation gets a word of its own added, and the words are looked for in what is rendered then.
What cannot be marked so, or was not found, is changed by itself: if that changes nothing in the text, the template
leaves it out. Nobody has to know the keys that a template knows.

An earlier turn of the assistant counts as rendered if it was rendered when it was the last one: templates take out
reasoning later on, in generation as in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rlpost.data.leaves import Leaf, Sort, changed, kind_of, leaves, place_of
from rlpost.data.templates import Job, Rendered, Talk, render_all
from rlpost.data.tool_calls import Arguments, formed
from rlpost.errors import DataError


class Unrendered(DataError):
    """A row says what the text made of it does not."""

    def __init__(self, location: str, left_out: str, remedy: str) -> None:
        super().__init__(f"{location}: {left_out}: {remedy}, or set its source's unrendered=drop")
        self.left_out = left_out


class Proof:
    """The proof of one conversation, in two steps, so that its first rendering goes along with others."""

    def __init__(self, talk: Talk, form: Arguments, generation: bool) -> None:
        """Mark every text.

        Args:
            talk: the conversation as it is.
            form: of tool calls' arguments.
            generation: it is rendered up to where the assistant would go on.
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
        """The rendering that shows most of it."""
        return Job(self._marked, len(self._talk.messages), self._generation)

    def left_out(self, tokenizer: Any, plain: Rendered, marked: Rendered, location: str) -> str | None:
        """What the template leaves out, in words, or None.

        Args:
            tokenizer: whose template it is.
            plain: the conversation rendered.
            marked: `job` rendered.
            place: for messages.
        """
        unsure = [leaf for leaf in self._leaves if leaf not in self._word or self._word[leaf] not in marked.text]
        unsure = [leaf for leaf in unsure if not self._is_said_by_calls(leaf)]
        for leaf in self._not_when_last(tokenizer, unsure, location):
            if not self._matters(tokenizer, leaf, plain, location):
                return place_of(leaf, self._talk.messages)
        squeezed_text = squeezed(plain.text)
        for leaf in self._leaves:
            if self._is_heard(leaf) and not holds(squeezed_text, leaf.value):
                half = len(leaf.value) // 2
                for other in (f"{_WORD}{leaf.value}", f"{leaf.value[:half]}{_WORD}{leaf.value[half:]}"):
                    if not self._differs(tokenizer, changed(self._talk, {leaf.path: other}, {}), plain, location):
                        return f"a part of {place_of(leaf, self._talk.messages)}"
        return None

    def _is_heard(self, leaf: Leaf) -> bool:
        """The content of a turn that is not the assistant's: those are looked at one by one."""
        if leaf.path[0] != "messages" or leaf.path[2:] != ("content",):
            return False
        return bool(self._talk.messages[int(leaf.path[1])]["role"] != "assistant")

    def _is_said_by_calls(self, leaf: Leaf) -> bool:
        """The name on a tool's answer says again what the call said."""
        root, *rest = leaf.path
        messages = self._talk.messages
        if root != "messages" or rest[1:] != ["name"] or messages[int(rest[0])]["role"] != "tool":
            return False
        calls = [call for m in messages[: int(rest[0])] for call in m.get("tool_calls") or ()]
        return leaf.value in [call.get("function", call)["name"] for call in calls]

    def _not_when_last(self, tokenizer: Any, unsure: Sequence[Leaf], location: str) -> Iterator[Leaf]:
        """Without those of an assistant's earlier turns that show when the turn is the last."""
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
        """Whether another value makes another text; found once for values that a template treats alike."""
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
    """Without white space: templates strip contents and set reasoning on lines of its own."""
    return "".join(text.split())


def holds(text: str, part: str) -> bool:
    """Whether a squeezed text holds another text, as it stands or as JSON spells it."""
    spelled = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return any(squeezed(form) in text for form in (part, *spelled))


_WORD = "zq7fe"
"""What no text holds."""
_MATTERS: dict[tuple[Any, ...], bool] = {}


def _is_markable(leaf: Leaf) -> bool:
    """A parameter's name stands in `required` too, so it is not changed along with everything."""
    return leaf.sort is Sort.words or (leaf.sort is Sort.chosen and leaf.path[0] == "messages")
