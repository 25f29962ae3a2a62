"""Tool calls of the model's turns: read, made, and answered with text that the model reads.

Whatever goes wrong, a call that cannot be read, an unknown tool, bad arguments, an exception, a tool that takes too
long or ends its process, is told to the model as text, and the episode goes on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlpost.console import Spell
from rlpost.data.codec import Codec
from rlpost.data.tool_format import ToolFormat, tool_format
from rlpost.data.tool_text import BadCall, ToolCall
from rlpost.errors import ModelError, RewardError
from rlpost.section import Section
from rlpost.suggest import hint_or_list, shortened
from rlpost.usercode.calls import GIVE_UP, CallError, Failed, Remote
from rlpost.usercode.tools import Result, failure
from rlpost.usercode.toolset import Tool, bound_tools

THREADS = 8
"""Calls of rlpost's own tools that are made at a time."""
_BRACKETS = re.compile(r"<\S+>|\[\S+\]")


def codec_with_tools(codec: Codec, section: Section, where: str, base: Path) -> Codec:
    """The codec that renders rows of a section with its tools, whose calls the chat template is proved to write.

    Raises:
        RecipeError: a tool cannot be bound. ModelError: calls cannot be read back.
    """
    tools = bound_tools(section, where, base)
    if not tools:
        return codec
    found = replace(codec, tools=tuple(tool.schema for tool in tools))
    format_of(found, f"{where}.tools")
    return found


def format_of(codec: Codec, where: str) -> ToolFormat:
    """How the codec's model writes calls of its tools.

    Raises:
        ModelError: there is no chat template, or calls cannot be read back.
    """
    if codec.template is None:
        raise ModelError(f"{where}: the tokenizer has no chat template: set model.chat_template=FILE.jinja")
    return tool_format(codec.tokenizer, codec.template, codec.tools)


@dataclass(frozen=True)
class Asked:
    """A call in a turn."""

    call: ToolCall | BadCall
    seed: int
    """Of the tool's random numbers."""


class Toolbox:
    """The tools of a section, ready to be called."""

    def __init__(self, tools: Sequence[Tool], codec: Codec, form: ToolFormat) -> None:
        """Of tools whose calls have that form; the `codec` tokenises what they return."""
        self._tools = {tool.name: tool for tool in tools}
        self._codec = codec
        self.form = form
        self.failing = Spell()
        """Whether tools have lost their processes."""

    def results(self, asked: Sequence[Asked]) -> list[Result]:
        """What came of calls, in order; those of coroutine functions, and of rlpost's own, are made together."""
        found: dict[int, Result] = {}
        by_tool: dict[str, list[int]] = {}
        for number, one in enumerate(asked):
            if isinstance(one.call, ToolCall) and one.call.name in self._tools:
                by_tool.setdefault(one.call.name, []).append(number)
            else:
                found[number] = self._unknown(one.call)
        for name, numbers in by_tool.items():
            found |= zip(numbers, self._of(self._tools[name], [asked[n] for n in numbers]), strict=True)
        return [self._readable(asked[number], found[number]) for number in range(len(asked))]

    async def together(self, asked: Sequence[Asked]) -> list[Result]:
        """The same for the calls of one turn, while others are under way."""
        return list(await asyncio.gather(*map(self._one, asked)))

    async def _one(self, asked: Asked) -> Result:
        call = asked.call
        tool = self._tools.get(call.name) if isinstance(call, ToolCall) else None
        if tool is None or not isinstance(call, ToolCall):
            return self._readable(asked, self._unknown(call))
        remote, arguments = tool.bound.call, {"arguments": call.arguments}
        if not isinstance(remote, Remote):
            loop = asyncio.get_running_loop()
            return self._readable(asked, await loop.run_in_executor(self._pool, remote, call.arguments))
        try:
            for _ in range(GIVE_UP):
                if (reply := await remote.once(arguments, asked.seed, None)) is not None:
                    return self._readable(asked, self._told(reply.found, tool))
        except CallError as error:
            raise RewardError(f"{tool.bound.where}: {error}") from error
        return self._readable(asked, failure(f"{tool.name} was not tried, after {GIVE_UP} calls lost its process"))

    def _of(self, tool: Tool, asked: Sequence[Asked]) -> Iterator[Result]:
        """The results of calls of one tool."""
        calls = [one.call.arguments for one in asked if isinstance(one.call, ToolCall)]
        remote = tool.bound.call
        if not isinstance(remote, Remote):
            yield from self._pool.map(remote, calls)
            return
        try:
            replies = remote.seeded(
                [{"arguments": arguments} for arguments in calls],
                [one.seed for one in asked],
                [None] * len(calls),
                keep_going=True,
            )
        except CallError as error:
            raise RewardError(f"{tool.bound.where}: {error}") from error
        yield from (self._told(reply.found, tool) for reply in replies)

    def _unknown(self, call: ToolCall | BadCall) -> Result:
        if isinstance(call, BadCall):
            return failure(f"the tool call cannot be read: {call.reason}")
        near = hint_or_list(call.name, self._tools, "there are")
        return failure(f"there is no tool {shortened(repr(call.name))}{near}")

    def _told(self, found: Any, tool: Tool) -> Result:
        """A reply of a process; the loss of it is told to the user, too."""
        if not isinstance(found, Failed):
            self.failing.ends("tools: they answer again")
            return Result(text=found["text"], failed=found["failed"])
        self.failing.begins(f"{tool.bound.where}: {tool.name} {found.reason}; the model is told so")
        return failure(f"{tool.name} {found.reason}")

    def _readable(self, asked: Asked, result: Result) -> Result:
        """The result as the model may read it: not too long, and without tokens that would end its turn."""
        tool = self._tools.get(asked.call.name) if isinstance(asked.call, ToolCall) else None
        text, most = result["text"], tool.max_result if tool else 1000
        if len(text) > most:
            text = f"{text[:most]}\n[cut: {most} of {len(text)} characters]"
        return Result(text=self.harmless(text), failed=result["failed"])

    def harmless(self, text: str) -> str:
        """The text with a space inside whatever the tokenizer would read as one of its control tokens.

        A character without a token, of a small tokenizer, becomes a question mark, or nothing.
        """
        tokenizer = self._codec.tokenizer
        text = self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.unk_token_id in ids:
            text = "".join(c if self._has(c) else "?" * self._has("?") for c in text)
            ids = tokenizer.encode(text, add_special_tokens=False)
        if self._control_ids.isdisjoint(ids):
            return text
        # A tokenizer that normalises what it reads.
        return str(tokenizer.decode([token for token in ids if token not in self._control_ids]))

    def _has(self, character: str) -> bool:
        """Whether the tokenizer has a token for a character."""
        tokenizer = self._codec.tokenizer
        return tokenizer.unk_token_id not in tokenizer.encode(character, add_special_tokens=False)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        names = sorted(self._control_tokens, key=lambda name: (-len(name), name))
        return re.compile("|".join(map(re.escape, names)))

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._control_tokens.values())

    @cached_property
    def _control_tokens(self) -> dict[str, int]:
        """Special tokens, and others that a tokenizer was given in angle or square brackets, with their ids."""
        tokenizer = self._codec.tokenizer
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        added |= {name: i for name, i in tokenizer.get_added_vocab().items() if _BRACKETS.fullmatch(name)}
        return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, "tool")
