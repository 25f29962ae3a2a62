"""Conversations through a tokenizer's chat template, cut into segments of which some are trained.

A segment boundary is a place in the rendered text that generation would also know: an assistant's turn
begins where the template's generation prompt ends, and ends with the template's stop token. Segments are
tokenised apart, so a prompt has the same ids in training as in generation. Example in ChatML, with | for
boundaries and the trained segment in quotes:

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎ | "Hello<|im_end|>" | ⏎<|im_start|>user⏎...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.errors import DataError, ModelError, RlpostError

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = "set model.chat_template=FILE.jinja"


@dataclass(frozen=True)
class Template:
    """What a probe found out about a chat template."""

    stop: str
    """The token that ends an assistant's turn, as text: "<|im_end|>"."""
    stop_id: int


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation."""

    text: str
    trained: bool


def opening(messages: Sequence[Message]) -> Sequence[Message]:
    """A conversation up to the answer it ends with, if it ends with one."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def validate(messages: Any, place: str) -> list[Message]:
    """The messages with their roles and contents checked; keys that are null are left out.

    Raises:
        DataError: not a list of messages, an unknown role, or a content that is missing or no text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{place}: messages must be a list of at least one {{role, content}}")
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"{place}: message {number}"
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(f"{where} has no role: a message is {{role, content}}")
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"{where}: role {role!r} is none of {', '.join(ROLES)}")
        content = message.get("content")
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls):
            kind = "missing" if content is None else f"{type(content).__name__}, not text"
            raise DataError(f"{where} ({role}): its content is {kind}")
        if role == "assistant" and not (content and content.strip()) and not calls:
            raise DataError(f"{where} (assistant): its content is empty")
        checked.append({k: v for k, v in message.items() if v is not None} | {"content": content or ""})
    return checked


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    place: str,
    *,
    tools: Any = None,
    generation: bool = False,
    error: type[RlpostError] = DataError,
) -> str:
    """The conversation as text; with `generation`, up to where the assistant would go on.

    Raises:
        RlpostError: of class `error`, the template refuses the conversation. ModelError: there is no
        template.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ModelError(f"{place}: the tokenizer has no chat template: {_REMEDY}")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=generation
        )
    except (
        TemplateError,
        TypeError,
    ) as failed:  # a type error is the template's, in what it does with a message
        reason = " ".join(str(failed).split())
        raise error(f"{place}: the chat template refuses it: {reason}: change the row, or {_REMEDY}") from failed
    assert isinstance(text, str)
    return text


def probe(tokenizer: Any) -> Template:
    """The stop token of the tokenizer's chat template, found by rendering a sample.

    Raises:
        ModelError: the template has no generation prompt, or ends an assistant's turn without a token of
        its own.
    """
    place = "chat template"
    asked, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    bare = render(tokenizer, [asked], place, error=ModelError)
    start = render(tokenizer, [asked], place, generation=True, error=ModelError)
    turn = render(tokenizer, [asked, answer], place, error=ModelError)
    if not turn.startswith(start):
        raise ModelError(
            f"{place}: its generation prompt does not begin an assistant's turn as it renders one, "
            f"so training and generation would differ: {_REMEDY}"
        )
    lead, found, after = turn[len(start) :].partition("b")
    if not found:
        raise ModelError(f"{place}: the assistant's content is not in its turn: {_REMEDY}")
    if lead.strip() and bare == start:
        raise ModelError(
            f"{place}: it ignores add_generation_prompt, so its header {lead!r} would be trained: {_REMEDY}"
        )
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    stops = [token for token in tokens if after.lstrip().startswith(token)]
    if not stops:
        raise ModelError(
            f"{place}: it ends an assistant's turn with {after!r} and no special token, "
            f"so generation would never stop there: {_REMEDY}"
        )
    stop = max(stops, key=len)
    return Template(stop, tokenizer.convert_tokens_to_ids(stop))


def segments(
    tokenizer: Any,
    template: Template,
    messages: Sequence[Message],
    place: str,
    *,
    first: int = 0,
    tools: Any = None,
) -> list[Segment]:
    """The conversation from its prompt to its last trained turn: assistant turns from message `first` on.

    Where the template renders an earlier turn otherwise once another follows it (reasoning taken out, say),
    its generation markers tell the turns; without markers the last turn alone is trained.

    Raises:
        DataError: no turn to train, one that holds the stop token, or not even the last turn can be told
        apart.
    """
    turns = [i for i in range(max(first, 1), len(messages)) if messages[i]["role"] == "assistant"]
    if not turns:
        raise DataError(f"{place} has no assistant turn after a prompt: there is nothing to train")
    for i in turns:
        if template.stop in messages[i]["content"]:
            raise DataError(f"{place}: message {i + 1} holds the stop token {template.stop!r}: take it out")
    full = render(tokenizer, messages, place, tools=tools)
    spans = [_span(tokenizer, template, messages, i, full, place, tools) for i in turns]
    if None in spans:
        spans = _marked(tokenizer, template, messages, turns, full, place, tools) or spans[-1:]
    proved = [span for span in spans if span is not None]
    if not proved:
        raise DataError(
            f"{place}: the chat template does not begin the last turn with its generation prompt: {_REMEDY}"
        )
    return _cut(full, proved)


def check_template(tokenizer: Any, conversation: Sequence[Message] | None = None) -> Template:
    """Prove on a conversation that what is trained decodes to the assistant's turns and their stop tokens.

    The sample is two short turns of the letters a to d unless `conversation` is given.

    Raises:
        ModelError: it does not, or the template cannot be used at all.
    """
    place = "chat template"
    sample = list(conversation) if conversation else _sample()
    template = probe(tokenizer)
    turns = [m for m in sample if m["role"] == "assistant"]
    cut = [s for s in segments(tokenizer, template, sample, place) if s.trained]
    for message, segment in zip(turns[-len(cut) :], cut, strict=True):
        ids = tokenizer.encode(segment.text, add_special_tokens=False)
        decoded = tokenizer.decode(ids)
        expected = message["content"].strip() + template.stop
        if ids.count(template.stop_id) != 1 or ids[-1] != template.stop_id:
            raise ModelError(f"{place}: {segment.text!r} does not end with its one stop token: {_REMEDY}")
        # Some tokenizers decode without a leading space.
        if decoded.lstrip() != segment.text.lstrip() or not _squeezed(decoded).endswith(_squeezed(expected)):
            raise ModelError(f"{place}: trained {decoded!r} where the turn is {expected!r}: {_REMEDY}")
    return template


def _sample() -> list[Message]:
    roles = ("user", "assistant", "user", "assistant")
    return [{"role": role, "content": letter} for role, letter in zip(roles, "abcd", strict=True)]


def _span(
    tokenizer: Any,
    template: Template,
    messages: Sequence[Message],
    i: int,
    full: str,
    place: str,
    tools: Any,
) -> tuple[int, int] | None:
    """Where turn `i` stands in `full`, stop token included; None unless generation would begin it there."""
    start = render(tokenizer, messages[:i], place, tools=tools, generation=True)
    rendered = render(tokenizer, messages[: i + 1], place, tools=tools)
    at = rendered.find(template.stop, len(start))
    end = at + len(template.stop)
    if at < 0 or not rendered.startswith(start):
        return None
    if _squeezed(messages[i]["content"]) not in _squeezed(rendered[len(start) : end]):
        raise DataError(
            f"{place}: the chat template leaves out a part of message {i + 1} (reasoning?), "
            f"which would not be trained: {_REMEDY}"
        )
    return (len(start), end) if full.startswith(rendered[:end]) else None


def _marked(
    tokenizer: Any,
    template: Template,
    messages: Sequence[Message],
    turns: Sequence[int],
    full: str,
    place: str,
    tools: Any,
) -> list[tuple[int, int] | None] | None:
    """The spans of `turns` by the template's generation markers; None when there are none that fit."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = tokenizer.get_chat_template()
    if not _MARKER.search(source):
        return None
    rendered, marks = render_jinja_template(
        [list(messages)],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    start = render(tokenizer, messages[: turns[-1]], place, tools=tools, generation=True)
    if rendered[0] != full or len(marks[0]) != len(assistants) or not full.startswith(start):
        return None
    spans: list[tuple[int, int] | None] = []
    for i, (begin, end) in zip(assistants, marks[0], strict=True):
        at = full.find(template.stop, begin)
        # Markers may end before the stop token, which is trained all the same.
        if at < 0 or full[end:at].strip():
            return None
        if i in turns:
            spans.append((begin, at + len(template.stop)))
    return spans if spans[-1] is not None and spans[-1][0] == len(start) else None


def _cut(full: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    pieces = []
    position = 0
    for begin, end in spans:
        pieces += [Segment(full[position:begin], False), Segment(full[begin:end], True)]
        position = end
    return pieces


def _squeezed(text: str) -> str:
    """Without white space: templates strip contents and set reasoning on lines of its own."""
    return "".join(text.split())
