"""Conversations rendered by a tokenizer's chat template, cut into segments of which some are trained.

Segment boundaries are those of generation: an assistant's turn begins where the template's generation prompt
ends, and ends with the template's stop token. Segments are tokenised separately, so a prompt has the same ids
in training as in generation. Example in ChatML, with | for
boundaries and the trained segment in quotes:

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎ | "Hello<|im_end|>" | ⏎<|im_start|>user⏎...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlpost.data.leaves import Sort, leaves
from rlpost.data.messages import Message, is_trained, without_marks
from rlpost.data.templates import REMEDY, Job, Rendered, Talk, render_all
from rlpost.data.tool_calls import formed, wanted_form
from rlpost.data.unrendered import Proof, Unrendered, holds, squeezed
from rlpost.errors import DataError, ModelError, RlpostError

_HEADER = 200
"""Characters of a generation prompt, at most."""
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Template:
    """What `probe` found in a chat template."""

    stop: str
    """The token that ends an assistant's turn, as text: "<|im_end|>"."""
    stop_id: int


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation."""

    text: str
    trained: bool


def text_of(rendered: Rendered, location: str, error: type[RlpostError] = DataError) -> str:
    """The rendered text.

    Raises:
        RlpostError: of class `error`, the template failed.
    """
    if rendered.error:
        remedy = f"change the row, or {REMEDY}" if error is DataError else REMEDY
        raise error(f"{location}: {'it' if error is ModelError else 'the chat template'} {rendered.error}: {remedy}")
    return rendered.text


def probe(tokenizer: Any) -> Template:
    """The stop token of the tokenizer's chat template, found by rendering a sample.

    Raises:
        ModelError: the template has no generation prompt, or ends an assistant's turn without a token of
        its own.
    """
    location = "chat template"
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    talk = Talk([user, answer])
    jobs = [Job(talk, 1), Job(talk, 1, generation=True), Job(talk, 2)]
    bare, start, turn = (text_of(r, location, ModelError) for r in render_all(tokenizer, jobs, location))
    if not turn.startswith(start):
        raise ModelError(
            f"{location}: its generation prompt does not begin an assistant's turn as it renders one, "
            f"so training and generation would differ: {REMEDY}"
        )
    lead, found, after = turn[len(start) :].partition("b")
    if not found:
        raise ModelError(f"{location}: the assistant's content is not in its turn: {REMEDY}")
    if lead.strip() and bare == start:
        raise ModelError(
            f"{location}: it ignores add_generation_prompt, so its header {lead!r} would be trained: {REMEDY}"
        )
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    stops = [token for token in tokens if after.lstrip().startswith(token)]
    if not stops:
        raise ModelError(
            f"{location}: it ends an assistant's turn with {after!r} and no special token, "
            f"so generation would never stop there: {REMEDY}"
        )
    stop = max(stops, key=len)
    return Template(stop, tokenizer.convert_tokens_to_ids(stop))


def prompt_text(tokenizer: Any, messages: Sequence[Message], tools: Any, location: str, strict: bool = True) -> str:
    """The conversation with its generation prompt.

    Raises:
        Unrendered: the template leaves out a part of it, and `strict`. DataError: the template fails.
    """
    talk = Talk(without_marks(messages), tools)
    form = wanted_form(tokenizer, talk, location)
    proof = Proof(talk, form, generation=True)
    plain, marked = render_all(
        tokenizer, [Job(formed(talk, form), len(messages), generation=True), proof.job], location
    )
    text = text_of(plain, location)
    if strict:
        _refuse(proof.left_out(tokenizer, plain, marked, location), location)
    return text


def segments(
    tokenizer: Any,
    template: Template,
    messages: Sequence[Message],
    location: str,
    *,
    first: int = 0,
    tools: Any = None,
    strict: bool = True,
) -> list[Segment]:
    """The conversation from its prompt to its last trained turn: assistant turns from message `first` on.

    If the template renders an earlier turn differently once another follows it (without its reasoning, say), turns are
    found by its generation markers, and those that lose a part are not trained; without markers only the last one is.

    Raises:
        Unrendered: the template leaves out a part of the conversation, and `strict`.
        DataError: there is no turn to train, one holds the stop token, or not even the last turn can be found.
    """
    turns = [i for i in range(max(first, 1), len(messages)) if is_trained(messages[i])]
    if not turns:
        raise DataError(f"{location} has no assistant turn after a prompt that is to be trained")
    for i in turns:
        if template.stop in messages[i]["content"]:
            raise DataError(f"{location}: message {i + 1} holds the stop token {template.stop!r}: take it out")
    # Turns after the last trained one are context of nothing.
    talk = Talk(without_marks(messages[: turns[-1] + 1]), tools)
    form = wanted_form(tokenizer, talk, location)
    formed_talk = formed(talk, form)
    proof = Proof(talk, form, generation=False)
    jobs = [Job(formed_talk, n, generation) for i in turns for n, generation in ((i, True), (i + 1, False))]
    *plain, marked = render_all(tokenizer, [*jobs, proof.job], location)
    texts = [text_of(r, location) for r in plain]
    full = texts[-1]
    spans = [_span(template, start, turn, full) for start, turn in zip(texts[::2], texts[1::2], strict=True)]
    last = spans[-1]
    if last is None:
        raise DataError(
            f"{location}: the chat template does not begin the last turn with its generation prompt: {REMEDY}"
        )
    if strict:
        for i, span in zip(turns, spans, strict=True):
            _refuse(_missing(talk, i, full, span), location)
        _refuse(proof.left_out(tokenizer, plain[-1], marked, location), location)
    if None in spans:
        found = _marked(tokenizer, template, formed_talk, turns, full, last, location)
        whole = [span if not _missing(talk, i, full, span) else None for i, span in zip(turns, found, strict=True)]
        spans = [*whole[:-1], last]
    proved = [span for span in spans if span is not None]
    for begin, end in proved:
        if full[begin:end].strip() == template.stop:
            raise DataError(f"{location}: the chat template renders nothing of a turn but its end: {REMEDY}")
    return _cut(full, proved)


def _refuse(left_out: str | None, location: str) -> None:
    if left_out is not None:
        raise Unrendered(
            location, f"the chat template leaves out {left_out}", f"{REMEDY} that renders it, take it out of the row"
        )


def _missing(talk: Talk, turn: int, full: str, span: tuple[int, int] | None) -> str | None:
    """The part of a turn that is not in its span of the text, in words; None if all is, or there is no span.

    A generation prompt may already contain the beginning of the content: <think>.
    """
    if span is None:
        return None
    begin, end = span
    text, before = squeezed(full[begin:end]), squeezed(full[max(begin - _HEADER, 0) : begin])
    for leaf in leaves(Talk([talk.messages[turn]])):
        length = len(squeezed(str(leaf.value)))
        begun = before[-(length - 1) :] if leaf.path[2:] == ("content",) and length > 1 else ""
        if leaf.sort is not Sort.fixed and not holds(begun + text, str(leaf.value)):
            return f"a part of message {turn + 1}, its {leaf.path[2]}"
    return None


def _span(template: Template, start: str, rendered: str, full: str) -> tuple[int, int] | None:
    """The span of a turn in `full`, stop token included; None unless generation would begin it there."""
    at = rendered.find(template.stop, len(start))
    end = at + len(template.stop)
    if at < 0 or not rendered.startswith(start):
        return None
    return (len(start), end) if full.startswith(rendered[:end]) else None


def _marked(
    tokenizer: Any,
    template: Template,
    talk: Talk,
    turns: Sequence[int],
    full: str,
    last: tuple[int, int],
    location: str,
) -> list[tuple[int, int] | None]:
    """The spans of `turns` by the template's generation markers; only the last one's if they do not fit."""
    alone: list[tuple[int, int] | None] = [*[None] * (len(turns) - 1), last]
    if not _MARKER.search(tokenizer.get_chat_template(tools=talk.tools)):
        return alone
    (rendered,) = render_all(tokenizer, [Job(talk, len(talk.messages), marks=True)], location)
    assistants = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if rendered.text != full or len(rendered.generated) != len(assistants):
        return alone
    spans: dict[int, tuple[int, int]] = {}
    for i, (begin, end) in zip(assistants, rendered.generated, strict=True):
        at = full.find(template.stop, begin)
        # Markers may end before the stop token, which is trained too.
        if at < 0 or full[end:at].strip():
            return alone
        spans[i] = (begin, at + len(template.stop))
    return [spans[i] for i in turns] if spans[turns[-1]] == last else alone


def _cut(full: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    pieces = []
    position = 0
    for begin, end in spans:
        pieces += [Segment(full[position:begin], False), Segment(full[begin:end], True)]
        position = end
    return pieces
