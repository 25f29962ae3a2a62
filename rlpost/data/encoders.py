"""Encoders of rows as groups: text, prompts with answers, conversations, pairs.

A prompt is text or a list of messages; text is tokenised as it is, messages go through the chat template. Prompt and
completion are tokenised separately, so a prompt has the ids that generation sees. The end of every completion is
trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.data import chat
from rlpost.data.codec import Codec
from rlpost.data.columns import missing
from rlpost.data.messages import SYSTEM, Message, tools_of, validate
from rlpost.data.unrendered import Unrendered, holds, squeezed
from rlpost.errors import DataError, ModelError
from rlpost.types import Completion, Group

Row = Mapping[str, Any]


def encode_text(row: Row, codec: Codec, location: str) -> Group:
    """A text to learn; its prompt is the begin token, or else its first token, which cannot be predicted."""
    text = as_text(value_of(row, "text", location), "text", location)
    whole, shown = _ended(text, codec, location)
    begin = codec.begin or begin_token(codec)
    if begin:
        prompt, ids = begin, whole[len(begin) :] if whole[: len(begin)] == begin else whole
    else:
        prompt, ids = whole[:1], whole[1:]
    if not ids:
        raise DataError(f"{location}: 'text' is empty")
    return Group(prompt, (Completion(ids, (True,) * len(ids), shown),), row)


def encode_answered(row: Row, codec: Codec, location: str) -> Group:
    """A prompt with one answer."""
    prompt, answer = value_of(row, "prompt", location), value_of(row, "completion", location)
    if isinstance(prompt, str) and isinstance(answer, str):
        if not answer:
            raise DataError(f"{location}: 'completion' is empty")
        return Group(plain_prompt(prompt, codec, location), (plain_completion(answer, codec, location),), row)
    prompt_messages = as_messages(prompt, "user", f"{location}, prompt")
    answered = as_messages(answer, "assistant", f"{location}, completion")
    ids, completion = conversation(row, prompt_messages + answered, len(prompt_messages), codec, location)
    return Group(ids, (completion,), row)


def encode_pair(row: Row, codec: Codec, location: str) -> Group:
    """A prompt with a chosen and a rejected answer, in this order."""
    return _compared(row, ("chosen", "rejected"), codec, location)


def encode_triple(row: Row, codec: Codec, location: str) -> Group:
    """A prompt with a chosen, a rejected and a gold answer, in this order; the gold one is the column `reference`."""
    return _compared(row, ("chosen", "rejected", "reference"), codec, location)


def _compared(row: Row, columns: Sequence[str], codec: Codec, location: str) -> Group:
    """A prompt with the answers in these columns, of which the first two are a pair."""
    given = [value_of(row, column, location) for column in columns]
    if all(isinstance(value, str) for value in given) and isinstance(value_of(row, "prompt", location), str):
        prompt = plain_prompt(row["prompt"], codec, location)
        return Group(prompt, tuple(plain_completion(text, codec, location) for text in given), row)
    talks = [as_messages(v, "assistant", f"{location}, {c}") for v, c in zip(given, columns, strict=True)]
    if all(talk[0]["role"] != "assistant" for talk in talks):
        # Whole conversations contain their prompt: the messages they have in common.
        first = common(talks[0], talks[1], location)
        for talk, column in zip(talks[2:], columns[2:], strict=True):
            _check_beginning(talk, talks[0][:first], f"{location}, {column}")
        _check_prompt_column(row.get("prompt"), talks[0][:first], location)
    else:
        prompt_messages = as_messages(value_of(row, "prompt", location), "user", f"{location}, prompt")
        first, talks = len(prompt_messages), [prompt_messages + talk for talk in talks]
    encoded = [conversation(row, t, first, codec, f"{location}, {c}") for t, c in zip(talks, columns, strict=True)]
    if len({prompt for prompt, _ in encoded}) > 1:
        raise DataError(
            f"{location}: the chat template gives {' and '.join(columns)} different prompts: "
            "give each a single assistant turn, or set model.chat_template=FILE.jinja"
        )
    return Group(encoded[0][0], tuple(answer for _, answer in encoded), row)


def _check_beginning(talk: Sequence[Message], prompt: Sequence[Message], location: str) -> None:
    """Check that a whole conversation begins with the prompt of others, and then answers.

    Raises:
        DataError: it does not.
    """
    first = len(prompt)
    if list(talk[:first]) != list(prompt) or len(talk) == first or talk[first]["role"] != "assistant":
        raise DataError(
            f"{location}: it is not an answer to the {first} messages that chosen and rejected have in common: "
            "give the same prompt in all three"
        )


def common(good: Sequence[Message], bad: Sequence[Message], location: str) -> int:
    """Number of messages that two conversations have in common, before an assistant's turn."""
    shared = 0
    while shared < min(len(good), len(bad)) and good[shared] == bad[shared]:
        shared += 1
    if shared == 0 or shared in (len(good), len(bad)):
        what = "nothing in common to be the prompt" if shared == 0 else "no difference after their common part"
        raise DataError(f"{location}: chosen and rejected have {what}")
    if good[shared]["role"] != "assistant" or bad[shared]["role"] != "assistant":
        raise DataError(
            f"{location}: chosen and rejected first differ in message {shared + 1}, which is not the assistant's"
        )
    return shared


def conversation(
    row: Row, messages: list[Message], first: int, codec: Codec, location: str
) -> tuple[tuple[int, ...], Completion]:
    """Prompt ids and completion of a conversation whose assistant turns from `first` on are trained."""
    template = template_of(codec, location)
    _check_answer(messages, first, location)
    tools = tools_for(row, codec, location)
    cut = chat.segments(codec.tokenizer, template, messages, location, first=first, tools=tools, strict=codec.strict)
    _check_columns(row, "".join(segment.text for segment in cut), codec, location)
    ids: list[int] = []
    action: list[bool] = []
    for segment in cut[1:]:
        piece = codec.ids(segment.text, location)
        if segment.trained and (piece[-1] != template.stop_id or template.stop_id in piece[:-1]):
            raise DataError(f"{location}: a turn does not end with its one stop token {template.stop!r}")
        ids += piece
        action += [segment.trained] * len(piece)
    last = next(m for m in reversed(messages) if m["role"] == "assistant")
    prompt = codec.ids(cut[0].text, location)
    return prompt, Completion(ids, action, last["content"])


def plain_completion(text: str, codec: Codec, location: str) -> Completion:
    """A plain completion: its tokens and the end token."""
    ids, shown = _ended(text, codec, location)
    return Completion(ids, (True,) * len(ids), shown)


def _ended(text: str, codec: Codec, location: str) -> tuple[tuple[int, ...], str]:
    """The tokens of a text with the end token, and the text without it."""
    ids = codec.ids(text, location)
    if codec.end in ids[:-1]:
        raise DataError(f"{location}: the end token stands inside a completion: take it out")
    if ids[-1:] != (codec.end,):
        ids = (*ids, codec.end)
    return ids, text.removesuffix(codec.end_name)


def prompt_ids(row: Row, codec: Codec, location: str) -> tuple[int, ...]:
    """The ids of a row's prompt."""
    prompt = value_of(row, "prompt", location)
    if isinstance(prompt, str):
        if codec.tools:
            raise DataError(
                f"{location}: its prompt is text, but tools are told of in a conversation: give messages, "
                '[{"role": "user", "content": ...}]'
            )
        return plain_prompt(prompt, codec, location)
    messages = as_messages(prompt, "user", f"{location}, prompt")
    return conversation_prompt(row, messages, codec, location)


def conversation_prompt(row: Row, messages: list[Message], codec: Codec, location: str) -> tuple[int, ...]:
    """The ids of a conversation with its generation prompt."""
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError(f"{location}: the prompt ends with an assistant turn: there is nothing to answer")
    template_of(codec, location)
    text = chat.prompt_text(codec.tokenizer, messages, tools_for(row, codec, location), location, codec.strict)
    _check_columns(row, text, codec, location)
    return codec.ids(text, location)


def tools_for(row: Row, codec: Codec, location: str) -> list[Any] | None:
    """The tools that a conversation is rendered with: the row's, or those that the recipe names.

    Raises:
        DataError: there are both.
    """
    own = tools_of(row, location)
    if own and codec.tools:
        raise DataError(
            f"{location}: it has tools of its own, and the recipe names tools: take the column 'tools' out of the row, "
            "or `tools` out of the recipe"
        )
    return own or [dict(tool) for tool in codec.tools] or None


def plain_prompt(prompt: str, codec: Codec, location: str) -> tuple[int, ...]:
    """The ids of a plain prompt, never empty."""
    ids = codec.ids(prompt, location)
    if ids[: len(codec.begin)] != codec.begin:
        ids = (*codec.begin, *ids)
    ids = ids or begin_token(codec)
    if not ids:
        raise DataError(f"{location}: 'prompt' is empty, and the tokenizer has no begin token to stand for it")
    return ids


def begin_token(codec: Codec) -> tuple[int, ...]:
    """The ids of an empty prompt: the begin token, if there is one."""
    begin = codec.tokenizer.bos_token_id
    return () if begin is None else (begin,)


def template_of(codec: Codec, location: str) -> chat.Template:
    """The chat template.

    Raises:
        ModelError: there is none.
    """
    if codec.template is None:
        raise ModelError(f"{location}: the tokenizer has no chat template: set model.chat_template=FILE.jinja")
    return codec.template


def as_messages(value: Any, role: str, location: str) -> list[Message]:
    """Messages as they are, text as the one message of `role`."""
    return validate([{"role": role, "content": value}] if isinstance(value, str) else value, location)


_UNREAD = (*SYSTEM, "functions", "documents", "images", "videos", "audios", "chat_template_kwargs")
"""Columns of conversation data sets that belong to the conversation but are not given to the template."""


def _check_columns(row: Row, text: str, codec: Codec, location: str) -> None:
    """Check that no other column belongs to the conversation.

    Raises:
        Unrendered: one does.
    """
    for column in _UNREAD:
        value = row.get(column)
        if not value or not codec.strict or (isinstance(value, str) and holds(squeezed(text), value)):
            continue
        raise Unrendered(
            location,
            f"its column {column!r} is not read, though it belongs to the conversation",
            "put what it says into the messages, rename it (with `map`)",
        )


def _check_prompt_column(prompt: Any, shared: Sequence[Message], location: str) -> None:
    """Check that the prompt column only repeats messages that whole conversations begin with.

    Raises:
        DataError: it has other messages.
    """
    prompt_messages = [] if not prompt else as_messages(prompt, "user", f"{location}, prompt")
    known = [(m["role"], squeezed(m["content"])) for m in shared]
    for number, message in enumerate(prompt_messages, start=1):
        if (message["role"], squeezed(message["content"])) not in known:
            raise DataError(
                f"{location}: message {number} of its prompt ({message['role']}) is not in chosen and rejected, which "
                "are whole conversations: put it at the beginning of both, or give only the answers there"
            )


def _check_answer(messages: Sequence[Message], first: int, location: str) -> None:
    """Check that the answer does not begin with its prompt again.

    Raises:
        DataError: it does.
    """
    if first and messages[first]["role"] != "assistant" and list(messages[:first]) == list(messages[first : 2 * first]):
        raise DataError(
            f"{location}: the answer repeats the prompt, and is a whole conversation: give it as `messages`"
        )


def value_of(row: Row, column: str, location: str) -> Any:
    """The text or messages in a column."""
    if column not in row:
        raise DataError(f"{location} {missing(column, row)}")
    value = row[column]
    if not isinstance(value, str | list | tuple):
        kind = "null" if value is None else f"{type(value).__name__} ({value!r:.40})"
        raise DataError(
            f"{location}: {column!r} is {kind}, not text or messages: "
            f'a template makes text of it, columns: {{{column}: "{{{column}}}"}}'
        )
    return value


def as_text(value: Any, column: str, location: str) -> str:
    """The value as text.

    Raises:
        DataError: it is not text.
    """
    if not isinstance(value, str):
        raise DataError(f"{location}: {column!r} must be text")
    return value
