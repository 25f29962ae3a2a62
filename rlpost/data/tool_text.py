"""Tool calls in the text of a model's turn: JSON, between what its chat template writes around it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

END_OF_THOUGHT = "</think>"
_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it."""

    name: str
    arguments: dict[str, Any]
    id: str | None = field(default=None, compare=False)
    """Nine letters and digits that the model gave it, as Mistral's do."""


@dataclass(frozen=True)
class BadCall:
    """What was to be a call, but cannot be read."""

    reason: str
    text: str
    """What the model wrote."""


@dataclass(frozen=True)
class Turn:
    """A turn of the model, read."""

    content: str
    """What it says beside its calls."""
    calls: tuple[ToolCall | BadCall, ...] = ()


class Malformed(Exception):
    """What cannot be read as a call; its message says why."""


@dataclass(frozen=True)
class Shape:
    """Where the JSON of a call has its name and its arguments."""

    name: tuple[str, ...] | None
    """Keys on the way to the name; None: it stands before the JSON, which is the arguments."""
    arguments: tuple[str, ...] = ()
    is_list: bool = False
    middle: re.Pattern[str] | None = None
    """What stands between such a name and its arguments."""

    def read(self, text: str, at: int) -> tuple[list[ToolCall], int]:
        """The calls at a place, and where they end.

        Raises:
            Malformed: there are none.
        """
        name = ""
        if self.middle is not None:
            before = self.middle.search(text, at)
            if before is None:
                raise Malformed("it has no arguments")
            name, at = text[at : before.start()].strip(), before.end()
        value, end = _decoded(text, at)
        if self.name is None:
            return [checked(name, value)], end
        values = value if self.is_list and isinstance(value, list) else [value]
        return [self._call(one, self.name) for one in values], end

    def _call(self, value: Any, name: tuple[str, ...]) -> ToolCall:
        found = checked(_at(value, name, "a name"), _at(value, self.arguments, "arguments"))
        number = value.get("id")
        return replace(found, id=number) if isinstance(number, str) and _ID.fullmatch(number) else found


@dataclass(frozen=True)
class JsonFormat:
    """Calls as JSON, between what the template writes around them."""

    opening: re.Pattern[str] | None
    """Before calls; None: a call is the whole turn."""
    shape: Shape
    between: re.Pattern[str] | None
    """Between two calls, if several go into one opening."""
    closing: re.Pattern[str] | None
    """After calls, if anything."""

    def read(self, text: str) -> Turn:
        """A turn; what stands in the model's reasoning is no call."""
        at = text.rfind(END_OF_THOUGHT) + len(END_OF_THOUGHT) if END_OF_THOUGHT in text else 0
        return self._bare(text, at) if self.opening is None else self._marked(text, at, self.opening)

    def _bare(self, text: str, at: int) -> Turn:
        body = text[at:].strip()
        if not body.startswith("[" if self.shape.is_list else "{"):
            return Turn(text.strip())
        try:
            calls, end = self.shape.read(body, 0)
        except Malformed as wrong:
            return Turn("", (BadCall(str(wrong), body),)) if _like_a_call(body) else Turn(text.strip())
        if body[end:].strip():
            return Turn("", (BadCall("a call is a whole turn, and nothing follows it", body),))
        return Turn(text[:at].strip(), tuple(calls))

    def _marked(self, text: str, at: int, opening: re.Pattern[str]) -> Turn:
        said, calls = [text[:at]], list[ToolCall | BadCall]()
        while begun := opening.search(text, at):
            said.append(text[at : begun.start()])
            at = self._several(text, begun.end(), calls)
        return Turn("".join([*said, text[at:]]).strip(), tuple(calls))

    def _several(self, text: str, at: int, calls: list[ToolCall | BadCall]) -> int:
        """Add the calls after one opening; returns where they end."""
        while True:
            found, at = self._one(text, at)
            calls += found
            following = self.between.match(text, at) if self.between else None
            if following is None:
                break
            at = following.end()
        closed = self.closing.match(text, at) if self.closing else None
        return closed.end() if closed else at

    def _one(self, text: str, at: int) -> tuple[list[ToolCall] | list[BadCall], int]:
        """A call, or the text up to the end of what cannot be read as one."""
        begin = at
        try:
            found, at = self.shape.read(text, at)
        except Malformed as wrong:
            reason = str(wrong)
        else:
            if self.closing is None or self.closing.match(text, at) or not text[at:].strip():
                return found, at  # a stop string may have cut off the end
            if self.between is not None and self.between.match(text, at):
                return found, at
            reason = f"it is followed by {text[at : at + 20].strip()!r}"
        ends = [p.search(text, begin) for p in (self.closing, self.between, self.opening) if p is not None]
        end = min((match.start() for match in ends if match), default=len(text))
        return [BadCall(reason, text[begin:end].strip())], end


def flexible(literal: str) -> re.Pattern[str]:
    """A pattern of a literal, with any space around and where it has some."""
    return re.compile(r"\s*" + r"\s+".join(map(re.escape, literal.split())) + r"\s*")


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


JSON = json.JSONDecoder(parse_constant=_constant)


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        return JSON.raw_decode(text, at)
    except RecursionError:
        raise Malformed("its JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"it is not JSON: {error.msg} at character {error.pos - at}") from None
    except ValueError as error:
        raise Malformed(f"it is not JSON: {error}"[:200]) from None


def _at(value: Any, path: Sequence[str], what: str) -> Any:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise Malformed(f"it has no {'.'.join(path)!r}, {what}")
        value = value[key]
    return value


def checked(name: Any, arguments: Any) -> ToolCall:
    """The call of that name with these arguments, an object or JSON of one.

    Raises:
        Malformed: they are something else.
    """
    if isinstance(arguments, str):  # JSON in JSON
        arguments, _ = _decoded(arguments, 0)
    if not isinstance(name, str) or not name:
        raise Malformed("its name is no text")
    if not isinstance(arguments, dict):
        raise Malformed("its arguments are no object")
    return ToolCall(name, arguments)


def _like_a_call(body: str) -> bool:
    """Whether what is no call was to be one: broken JSON, or an object with a name."""
    try:
        value = JSON.decode(body)
    except (ValueError, RecursionError):
        return True
    return isinstance(value, dict) and "name" in value
