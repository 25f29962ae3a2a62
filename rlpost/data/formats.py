"""Rows to groups: which format the columns are in, and how each is encoded.

A prompt is text or a list of messages; text goes to the model as it is, messages through the chat template.
Prompt and completion are tokenised apart, so a prompt's ids are those that generation sees. The end of
every completion is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from rlpost.data import chat
from rlpost.data.codec import Codec
from rlpost.data.columns import missing
from rlpost.errors import DataError, ModelError
from rlpost.groups import Completion, Group

Row = Mapping[str, Any]


class Format(StrEnum):
    """What the columns of a row mean; the value is how it is told to the user."""

    pair = "prompt, chosen, rejected"
    completion = "prompt, completion"
    messages = "messages"
    text = "text"
    prompt = "prompt"
    opening = "messages up to the last answer"
    """Only as prompts: the conversation without the assistant turn it ends with."""


class Need(StrEnum):
    """What a caller does with the rows."""

    completions = "completions"
    pairs = "pairs"
    prompts = "prompts"


_COLUMNS = {
    Format.pair: ("chosen", "rejected"),
    Format.completion: ("prompt", "completion"),
    Format.messages: ("messages",),
    Format.text: ("text",),
    Format.prompt: ("prompt",),
    Format.opening: ("messages",),
}
_FORMATS = {
    None: (Format.pair, Format.completion, Format.messages, Format.text, Format.prompt),
    Need.completions: (Format.completion, Format.messages, Format.text),
    Need.pairs: (Format.pair,),
    Need.prompts: (Format.prompt, Format.opening),
}
_EXAMPLES = {
    None: "columns: {prompt: COLUMN, completion: COLUMN}",
    Need.completions: "columns: {prompt: COLUMN, completion: COLUMN}",
    Need.pairs: "columns: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}",
    Need.prompts: "columns: {prompt: COLUMN}",
}


def recognise(rows: Sequence[Row], where: str, need: Need | None = None) -> Format:
    """The format of the rows by the columns of the first, among those that serve `need`.

    Raises:
        DataError: none fits.
    """
    columns = [str(c) for c in rows[0]]
    for form in _FORMATS[need]:
        if all(column in columns for column in _COLUMNS[form]):
            return form
    wanted = " or ".join(f"({', '.join(_COLUMNS[form])})" for form in _FORMATS[need])
    raise DataError(
        f"{where} has the columns {', '.join(columns) or 'none'}, needed are {wanted}: name them with {_EXAMPLES[need]}"
    )


def encode(row: Row, form: Format, codec: Codec, place: str) -> Group:
    """The row as a group: one completion, two of a pair (chosen first), or none of a prompt.

    Raises:
        DataError: beginning with `place`, what the row lacks.
    """
    if form is Format.pair:
        return _pair(row, codec, place)
    if form is Format.completion:
        return _answered(row, codec, place)
    if form is Format.messages:
        messages = chat.validate(_value(row, "messages", place), f"{place}, messages")
        prompt, completion = _conversation(row, messages, 0, codec, place)
        return Group(prompt, (completion,), row)
    if form is Format.text:
        return _text(row, codec, place)
    if form is Format.opening:
        messages = chat.validate(_value(row, "messages", place), f"{place}, messages")
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return Group(_messages_prompt(row, asked, codec, place), (), row)
    return Group(_prompt(row, codec, place), (), row)


def untrained_turns(row: Row, group: Group) -> bool:
    """Whether some assistant turns of a messages row are context only."""
    action = group.completions[0].action
    runs = sum(now and not before for before, now in zip((False, *action), action, strict=False))
    turns: int = sum(m["role"] == "assistant" for m in row["messages"])
    return runs < turns


def row_texts(row: Row) -> list[str]:
    """All text of a row that a model would see: what a tokenizer is trained on."""
    texts = []
    for column in ("prompt", "completion", "chosen", "rejected", "text", "messages"):
        value = row.get(column)
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, list | tuple):
            texts += [m["content"] for m in value if isinstance(m, Mapping) and isinstance(m.get("content"), str)]
    return texts


def _text(row: Row, codec: Codec, place: str) -> Group:
    """The begin token, or else the first token, is the prompt: what comes first is never predicted."""
    text = _string(_value(row, "text", place), "text", place)
    completion = _completion(text, codec, place)
    begin = codec.begin or _begin_token(codec)
    if begin:
        without = completion.ids[len(begin) :] if completion.ids[: len(begin)] == begin else completion.ids
        prompt, ids = begin, without
    else:
        prompt, ids = completion.ids[:1], completion.ids[1:]
    if not ids:
        raise DataError(f"{place}: 'text' is empty")
    return Group(prompt, (Completion(ids, (True,) * len(ids), completion.text),), row)


def _answered(row: Row, codec: Codec, place: str) -> Group:
    prompt, answer = _value(row, "prompt", place), _value(row, "completion", place)
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer:
            raise DataError(f"{place}: 'completion' is empty")
        return Group(_string_prompt(prompt, codec, place), (_completion(answer, codec, place),), row)
    asked = _as_messages(prompt, "user", f"{place}, prompt")
    answered = _as_messages(answer, "assistant", f"{place}, completion")
    ids, completion = _conversation(row, asked + answered, len(asked), codec, place)
    return Group(ids, (completion,), row)


def _pair(row: Row, codec: Codec, place: str) -> Group:
    chosen, rejected = _value(row, "chosen", place), _value(row, "rejected", place)
    plain = isinstance(chosen, str) and isinstance(rejected, str)
    if plain and isinstance(_value(row, "prompt", place), str):
        prompt = _string_prompt(row["prompt"], codec, place)
        return Group(prompt, tuple(_completion(text, codec, place) for text in (chosen, rejected)), row)
    good = _as_messages(chosen, "assistant", f"{place}, chosen")
    bad = _as_messages(rejected, "assistant", f"{place}, rejected")
    if good[0]["role"] != "assistant" and bad[0]["role"] != "assistant":
        # Whole conversations carry their prompt with them: what they have in common.
        first = _common(good, bad, place)
    else:
        asked = _as_messages(_value(row, "prompt", place), "user", f"{place}, prompt")
        first, good, bad = len(asked), asked + good, asked + bad
    prompt, better = _conversation(row, good, first, codec, f"{place}, chosen")
    other, worse = _conversation(row, bad, first, codec, f"{place}, rejected")
    if prompt != other:
        raise DataError(
            f"{place}: the chat template gives chosen and rejected different prompts: "
            "give each a single assistant turn, or set model.chat_template=FILE.jinja"
        )
    return Group(prompt, (better, worse), row)


def _common(good: Sequence[chat.Message], bad: Sequence[chat.Message], place: str) -> int:
    """How many messages two conversations share, up to where an assistant answers."""
    shared = 0
    while shared < min(len(good), len(bad)) and good[shared] == bad[shared]:
        shared += 1
    if shared == 0 or shared in (len(good), len(bad)):
        what = "nothing in common to be the prompt" if shared == 0 else "no difference after their common part"
        raise DataError(f"{place}: chosen and rejected have {what}")
    if good[shared]["role"] != "assistant" or bad[shared]["role"] != "assistant":
        raise DataError(f"{place}: chosen and rejected first differ in message {shared + 1}, which is no assistant's")
    return shared


def _conversation(
    row: Row, messages: list[chat.Message], first: int, codec: Codec, place: str
) -> tuple[tuple[int, ...], Completion]:
    """Prompt ids and completion of a conversation whose assistant turns from `first` on are trained."""
    template = _template(codec, place)
    cut = chat.segments(codec.tokenizer, template, messages, place, first=first, tools=row.get("tools"))
    ids: list[int] = []
    action: list[bool] = []
    for segment in cut[1:]:
        piece = codec.ids(segment.text, place)
        if segment.trained and (piece[-1] != template.stop_id or template.stop_id in piece[:-1]):
            raise DataError(f"{place}: a turn does not end with its one stop token {template.stop!r}")
        ids += piece
        action += [segment.trained] * len(piece)
    last = next(m for m in reversed(messages) if m["role"] == "assistant")
    prompt = codec.ids(cut[0].text, place)
    return prompt, Completion(tuple(ids), tuple(action), last["content"])


def _completion(text: str, codec: Codec, place: str) -> Completion:
    ids = codec.ids(text, place)
    if codec.end in ids[:-1]:
        raise DataError(f"{place}: the end token stands inside a completion: take it out")
    if ids[-1:] != (codec.end,):
        ids = (*ids, codec.end)
    return Completion(ids, (True,) * len(ids), text.removesuffix(codec.tokenizer.eos_token))


def _prompt(row: Row, codec: Codec, place: str) -> tuple[int, ...]:
    prompt = _value(row, "prompt", place)
    if isinstance(prompt, str):
        return _string_prompt(prompt, codec, place)
    messages = _as_messages(prompt, "user", f"{place}, prompt")
    return _messages_prompt(row, messages, codec, place)


def _messages_prompt(row: Row, messages: list[chat.Message], codec: Codec, place: str) -> tuple[int, ...]:
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError(f"{place}: the prompt ends with an assistant turn: there is nothing to answer")
    _template(codec, place)
    text = chat.render(codec.tokenizer, messages, place, tools=row.get("tools"), generation=True)
    return codec.ids(text, place)


def _string_prompt(prompt: str, codec: Codec, place: str) -> tuple[int, ...]:
    ids = codec.ids(prompt, place)
    if ids[: len(codec.begin)] != codec.begin:
        ids = (*codec.begin, *ids)
    ids = ids or _begin_token(codec)
    if not ids:
        raise DataError(f"{place}: 'prompt' is empty, and the tokenizer has no begin token to stand for it")
    return ids


def _begin_token(codec: Codec) -> tuple[int, ...]:
    begin = codec.tokenizer.bos_token_id
    return () if begin is None else (begin,)


def _template(codec: Codec, place: str) -> chat.Template:
    if codec.template is None:
        raise ModelError(f"{place}: the tokenizer has no chat template: set model.chat_template=FILE.jinja")
    return codec.template


def _as_messages(value: Any, role: str, place: str) -> list[chat.Message]:
    """Messages as they are, text as the one message of `role`."""
    return chat.validate([{"role": role, "content": value}] if isinstance(value, str) else value, place)


def _value(row: Row, column: str, place: str) -> Any:
    if column not in row:
        raise DataError(f"{place} {missing(column, row)}")
    value = row[column]
    if not isinstance(value, str | list | tuple):
        kind = "null" if value is None else f"{type(value).__name__} ({value!r:.40})"
        raise DataError(
            f"{place}: {column!r} is {kind}, not text or messages: "
            f'a template makes text of it, columns: {{{column}: "{{{column}}}"}}'
        )
    return value


def _string(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} must be text")
    return value
