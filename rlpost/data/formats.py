"""Row formats: recognised by columns, encoded as groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NoReturn

import numpy as np

from rlpost.data.codec import Codec
from rlpost.data.encoders import (
    conversation,
    conversation_prompt,
    encode_answered,
    encode_pair,
    encode_text,
    encode_triple,
    prompt_ids,
    value_of,
)
from rlpost.data.labelled_formats import (
    check_margin,
    encode_labelled,
    encode_ranked,
    encode_recorded,
    encode_several,
    encode_steps,
)
from rlpost.data.messages import SYSTEM, is_trained, opening, validate
from rlpost.data.params import DataRole as DataRole
from rlpost.data.unrendered import Unrendered
from rlpost.errors import DataError
from rlpost.types import Group

Row = Mapping[str, Any]


class Format(StrEnum):
    """What the columns of a row mean; the value is its description for users."""

    pair = "prompt, chosen, rejected"
    triple = "prompt, chosen, rejected, reference"
    ranked = "prompt, completions, scores"
    ranked_pair = "prompt, chosen, rejected as a ranking"
    labelled = "prompt, completion, label"
    steps = "prompt, steps, labels"
    recorded = "prompt, completions as recorded"
    completion = "prompt, completion"
    several = "prompt, completions"
    messages = "messages"
    text = "text"
    prompt = "prompt"
    opening = "messages up to the last answer"
    """As a prompt: the conversation without the assistant turn it ends with."""


COLUMNS = {
    Format.pair: ("chosen", "rejected"),
    Format.triple: ("chosen", "rejected", "reference"),
    Format.ranked: ("prompt", "completions", "scores"),
    Format.ranked_pair: ("chosen", "rejected"),
    Format.labelled: ("prompt", "completion", "label"),
    Format.steps: ("prompt", "steps", "labels"),
    Format.recorded: ("prompt", "completions", "example"),
    Format.completion: ("prompt", "completion"),
    Format.several: ("prompt", "completions"),
    Format.messages: ("messages",),
    Format.text: ("text",),
    Format.prompt: ("prompt",),
    Format.opening: ("messages",),
}
"""The columns that a format is recognised by."""
_FORMATS = {
    None: (Format.pair, Format.completion, Format.several, Format.messages, Format.text, Format.prompt),
    DataRole.completions: (Format.completion, Format.several, Format.messages, Format.text),
    DataRole.pairs: (Format.pair,),
    DataRole.triples: (Format.triple,),
    DataRole.prompts: (Format.prompt, Format.opening),
    DataRole.labelled: (Format.labelled,),
    DataRole.ranked: (Format.ranked, Format.ranked_pair),
    DataRole.steps: (Format.steps,),
    DataRole.recorded: (Format.recorded,),
}
_EXAMPLES = {
    None: "columns: {prompt: COLUMN, completion: COLUMN}",
    DataRole.completions: "columns: {prompt: COLUMN, completion: COLUMN}",
    DataRole.pairs: "columns: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}",
    DataRole.triples: "columns: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN, reference: COLUMN}",
    DataRole.prompts: "columns: {prompt: COLUMN}",
    DataRole.labelled: "columns: {prompt: COLUMN, completion: COLUMN, label: COLUMN}",
    DataRole.ranked: "columns: {prompt: COLUMN, completions: COLUMN, scores: COLUMN}",
    DataRole.steps: "columns: {prompt: COLUMN, steps: COLUMN, labels: COLUMN}",
    DataRole.recorded: "columns: {prompt: COLUMN, completions: COLUMN, example: COLUMN}",
}


_USUAL = {
    "prompt": ("question", "query", "instruction", "problem", "user", "input"),
    "completion": ("answer", "response", "output", "solution", "assistant", "target"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred"),
    "reference": ("gold", "golden", "ideal"),
    "label": ("kto_tag",),
    "completions": ("responses", "answers", "candidates"),
    "scores": ("rewards", "ratings"),
    "steps": ("completions",),
}
"""Role -> usual names of its column; they are proposed, never read by themselves."""
_BESIDE = (*SYSTEM, "history", "context", "input")
"""Columns that say more of what is asked: with one of them, alpaca's roles are proposed."""


def _mapping(columns: Sequence[str], need: DataRole | None) -> str:
    """The `columns` to add: exact if each role has one candidate, or else with COLUMN to be replaced."""
    for form in _FORMATS[need]:
        asked = [c for c in ("prompt", *_USUAL["prompt"]) if c in columns]
        roles = ("prompt", *COLUMNS[form]) if "rejected" in COLUMNS[form] and asked else COLUMNS[form]
        beside = [c for c in columns if c in _BESIDE and [c] != asked]
        found = {role: [c for c in columns if c == role or c in _USUAL.get(role, ())] for role in roles}
        renamed = {role: role for role in roles}
        if beside and form in (Format.completion, Format.labelled, Format.pair, Format.triple) and "prompt" in found:
            renamed |= {"prompt": "instruction", "completion": "output"}
            found["prompt"] = [c for c in found["prompt"] if c not in beside]
            if "context" in beside:
                renamed["input"], found["input"] = "input", [c for c in beside if c in ("context", "input")]
        if all(len(candidates) == 1 for candidates in found.values()):
            named = [f"{renamed[r]}: {given[0]}" for r, given in found.items() if given[0] != renamed[r]]
            if named:
                return f"columns: {{{', '.join(named)}}}"
    return _EXAMPLES[need]


def recognise(rows: Sequence[Row], where: str, need: DataRole | None = None) -> Format:
    """The format of the rows by the columns of the first, among those for `need`.

    Raises:
        DataError: none fits.
    """
    form = fitting(list(rows[0]), need)
    if form is None:
        refuse(rows[0], where, need)
    return form


def fitting(columns: Sequence[str], need: DataRole | None) -> Format | None:
    """The first format for `need` whose columns are all there."""
    return next((form for form in _FORMATS[need] if all(column in columns for column in COLUMNS[form])), None)


def refuse(row: Row, where: str, need: DataRole | None) -> NoReturn:
    """Raise DataError: the row's columns fit no format; with the mapping to add."""
    columns = [str(c) for c in row]
    beside = "" if "prompt" in columns else "prompt, "
    wanted = " or ".join(
        f"({beside if 'rejected' in COLUMNS[form] else ''}{', '.join(COLUMNS[form])})" for form in _FORMATS[need]
    )
    raise DataError(
        f"{where} has the columns {', '.join(columns) or 'none'}, needed are {wanted}: "
        f"name them with {_mapping(columns, need)}"
    )


def encode(row: Row, form: Format, codec: Codec, location: str) -> Group:
    """The row as a group: one completion or several, two of a pair (chosen first), or none of a prompt.

    Raises:
        DataError: the row is malformed; the message begins with `location`.
    """
    texts = texts_of(row, form)
    if codec.strict and form is not Format.recorded and all(isinstance(text, str) for text in texts):
        _refuse_unread(row, form, texts, location)
    return _ENCODERS[form](row, codec, location)


def _refuse_unread(row: Row, form: Format, texts: Sequence[str], location: str) -> None:
    """Refuse columns that belong to a prompt and are not read where it is plain text."""
    if row.get("tools"):
        raise Unrendered(
            location,
            "its column 'tools' is not read, for it is plain text and has no chat template",
            "give its prompt as messages, rename the column (with `map`)",
        )
    for column in SYSTEM if form is not Format.text else ():
        said = row.get(column)
        if said and not (isinstance(said, str) and any(said in text for text in texts)):
            raise Unrendered(
                location,
                f"its column {column!r} is not read, for its prompt is plain text",
                f'put it into the prompt, columns: {{prompt: "{{{column}}} {{COLUMN}}"}}, or rename it (with `map`)',
            )


def _pair(row: Row, codec: Codec, location: str) -> Group:
    check_margin(row, location)
    return encode_pair(row, codec, location)


def _triple(row: Row, codec: Codec, location: str) -> Group:
    check_margin(row, location)
    return encode_triple(row, codec, location)


def _messages(row: Row, codec: Codec, location: str) -> Group:
    messages = validate(value_of(row, "messages", location), f"{location}, messages")
    prompt, completion = conversation(row, messages, 0, codec, location)
    return Group(prompt, (completion,), row)


def _opening(row: Row, codec: Codec, location: str) -> Group:
    messages = validate(value_of(row, "messages", location), f"{location}, messages")
    return Group(conversation_prompt(row, list(opening(messages)), codec, location), (), row)


def _prompt(row: Row, codec: Codec, location: str) -> Group:
    return Group(prompt_ids(row, codec, location), (), row)


_ENCODERS: dict[Format, Callable[[Row, Codec, str], Group]] = {
    Format.pair: _pair,
    Format.triple: _triple,
    Format.ranked: encode_ranked,
    Format.ranked_pair: encode_ranked,
    Format.labelled: encode_labelled,
    Format.steps: encode_steps,
    Format.recorded: encode_recorded,
    Format.completion: encode_answered,
    Format.several: encode_several,
    Format.messages: _messages,
    Format.text: encode_text,
    Format.prompt: _prompt,
    Format.opening: _opening,
}


def untrained_turns(row: Row, group: Group) -> bool:
    """Whether some assistant turns of a messages row are context only."""
    action = group.completions[0].action
    runs = np.count_nonzero(np.diff(action.astype(np.int8), prepend=0) == 1)
    turns = sum(map(is_trained, row["messages"][1:]))
    return int(runs) < turns


def is_plain(row: Row, form: Format, stop: str) -> bool:
    """Whether a row is plain text: no chat template is used, and its stop token is not in the text."""
    return form is not Format.recorded and all(
        isinstance(text, str) and stop not in text for text in texts_of(row, form)
    )


def texts_of(row: Row, form: Format) -> list[Any]:
    """The texts, or messages, in the columns of a row's format."""
    columns = COLUMNS[form] if form in (Format.text, Format.messages, Format.opening) else ("prompt", *COLUMNS[form])
    values = [row.get(column) for column in columns if column in (*_TEXTS, "messages")]
    items = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return [item for item in items if item is not None]


_TEXTS = ("prompt", "completion", "chosen", "rejected", "reference", "text", "steps", "completions")


def row_texts(row: Row) -> list[str]:
    """All text of a row that a model would read, to train a tokenizer on."""
    texts: list[str] = []
    for column in (*_TEXTS, "messages"):
        # Beside a pair it is a completion, elsewhere anything.
        value = None if column == "reference" and "rejected" not in row else row.get(column)
        for item in value if isinstance(value, list | tuple) else [value]:
            text = item.get("content") if isinstance(item, Mapping) else item
            texts += [text] if isinstance(text, str) else []
    return texts
