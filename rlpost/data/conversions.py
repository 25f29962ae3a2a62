"""Rows of well-known data sets as rows of a format: functions (row, location) -> the columns to add.

They raise DataError if the row breaks its layout. The functions `are_…` and `is_…` tell a layout by its first row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlpost.data.messages import Message
from rlpost.data.turns import check_order, dialogue, from_json, is_dialogue, is_turns, past, turns, with_system
from rlpost.errors import DataError

Row = dict[str, Any]


def _asked(row: Row, location: str) -> list[Message]:
    """The messages that alpaca's instruction, input, system and history make."""
    given = {c: row.get(c) for c in ("instruction", "input")}
    for column, value in given.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{location}: {column!r} is {value!r:.40}, not text")
    question = "\n".join(text for text in given.values() if text)
    if not question.strip():
        raise DataError(f"{location}: 'instruction' is empty")
    messages = [*past(row.get("history"), f"{location}: history"), {"role": "user", "content": question}]
    return with_system(messages, row, location)


def _answer(row: Row, column: str, location: str) -> Message:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        what = "empty" if value == "" or isinstance(value, str) else f"{value!r:.40}, not text"
        raise DataError(f"{location}: {column!r} is {what}")
    return {"role": "assistant", "content": value}


def has_its_input(row: Row) -> bool:
    """Whether what alpaca calls input is not under another name."""
    return "input" in row or "context" not in row


def alpaca(row: Row, location: str) -> Row:
    """`messages`, of instruction, input, system, history and output."""
    return {"messages": [*_asked(row, location), _answer(row, "output", location)]}


def alpaca_label(row: Row, location: str) -> Row:
    """`prompt` and `completion`; the label stays."""
    return {"prompt": _asked(row, location), "completion": [_answer(row, "output", location)]}


def alpaca_pair(row: Row, location: str) -> Row:
    """`prompt`, `chosen` and `rejected` as messages."""
    return {"prompt": _asked(row, location), **_answers(row, location)}


def _answers(row: Row, location: str) -> Row:
    """`chosen` and `rejected` as messages: of texts, single turns, or lists of turns."""
    made: Row = {}
    for column in ("chosen", "rejected"):
        value = row[column]
        if isinstance(value, str) and not value.lstrip().startswith("["):
            made[column] = [_answer(row, column, location)]
        else:
            listed = [value] if isinstance(value, Mapping) else value
            made[column] = turns(listed, f"{location}, {column}")
    return made


def _talk(column: str) -> Callable[[Row, str], list[Message]]:
    def messages(row: Row, location: str) -> list[Message]:
        found = with_system(turns(row[column], f"{location}, {column}"), row, location)
        check_order(found, f"{location}, {column}")
        return found

    return messages


def conversation(column: str) -> Callable[[Row, str], Row]:
    """`messages`, of the turns in a column."""
    read = _talk(column)
    return lambda row, location: {"messages": read(row, location)}


def labelled_conversation(column: str) -> Callable[[Row, str], Row]:
    """`prompt` and `completion`: the last answer, which is what the label is about."""
    read = _talk(column)

    def convert(row: Row, location: str) -> Row:
        messages = read(row, location)
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{location}, {column}: it does not end with the answer that is labelled")
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    return convert


def conversation_pair(column: str) -> Callable[[Row, str], Row]:
    """`prompt`, of the turns in a column, and the answers to it."""
    read = _talk(column)

    def convert(row: Row, location: str) -> Row:
        messages = read(row, location)
        if messages[-1]["role"] == "assistant":
            raise DataError(f"{location}, {column}: it ends with an answer, and chosen and rejected are others to it")
        return {"prompt": messages, **_answers(row, location)}

    return convert


def dialogue_pair(row: Row, location: str) -> Row:
    """`prompt`, `chosen` and `rejected`, of two texts of the turns of `Human:` and `Assistant:`."""
    chosen, rejected = (dialogue(row[c], f"{location}, {c}") for c in ("chosen", "rejected"))
    prompt = row.get("prompt") or ""
    if not isinstance(prompt, str) or not all(
        row[c].strip().startswith(prompt.strip()) for c in ("chosen", "rejected")
    ):
        raise DataError(f"{location}: 'prompt' is not what the dialogues begin with: take it out, or repeat it in both")
    return _split(chosen, rejected, location)


def turns_pair(row: Row, location: str) -> Row:
    """`prompt`, `chosen` and `rejected`, of turns {from, value}; without a prompt, of whole conversations."""
    both = _answers(row, location)
    chosen, rejected = both["chosen"], both["rejected"]
    if row.get("prompt"):
        prompt = row["prompt"]
        return {"prompt": turns(prompt, f"{location}, prompt") if is_turns(prompt) else prompt, **both}
    if chosen[0]["role"] == "assistant":
        raise DataError(f"{location}: chosen and rejected are answers alone, and there is no prompt")
    return _split(chosen, rejected, location)


def _split(chosen: list[Message], rejected: list[Message], location: str) -> Row:
    """Two whole conversations as prompt, chosen and rejected; equal ones differ nowhere but in their last turn."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen == rejected and chosen[-1]["role"] == "assistant":
        shared = len(chosen) - 1
    if shared == 0:
        raise DataError(f"{location}: chosen and rejected have no turn in common to be the prompt")
    if shared in (len(chosen), len(rejected)):
        raise DataError(f"{location}: one of chosen and rejected is only the beginning of the other")
    if chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise DataError(f"{location}: chosen and rejected first differ in turn {shared + 1}, which is not an answer")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


_ANSWER_KEYS = ("response", "text", "content", "answer", "completion")
_SCORE_KEYS = ("score", "overall_score", "rating", "reward")


def scored(row: Row, location: str) -> Row:
    """`completions` and `scores` of a list of objects, each with an answer and its score."""
    found = from_json(row["completions"], f"{location}, completions")
    answers, scores = [], []
    for i, item in enumerate(found if isinstance(found, list | tuple) else []):
        at = f"{location}, completions[{i}]"
        keys = [_only(item, names, at) for names in (_ANSWER_KEYS, _SCORE_KEYS)]
        answers.append(item[keys[0]])
        scores.append(item[keys[1]])
    return {"completions": answers, "scores": scores}


def asked_scored(row: Row, location: str) -> Row:
    """Like `scored`, with the `prompt` that alpaca's columns make."""
    return {"prompt": _asked(row, location), **scored(row, location)}


def _only(item: Any, names: Sequence[str], location: str) -> str:
    given = [name for name in names if isinstance(item, Mapping) and name in item]
    # In a column of structs every object has every key.
    given = [name for name in given if item[name] is not None] or given
    if len(given) != 1:
        what = f"{' and '.join(given)}: keep one" if given else f"none of {', '.join(names)}"
        raise DataError(f"{location} has {what}")
    return given[0]


def is_scored(row: Row) -> bool:
    """Whether the completions are objects with scores."""
    value = row["completions"]
    if isinstance(value, str):
        return value.lstrip().startswith("[{")
    first = value[0] if isinstance(value, list | tuple) and value else None
    return isinstance(first, Mapping) and "ids" not in first and any(name in first for name in _SCORE_KEYS)


def are_answers(row: Row) -> bool:
    """Whether chosen and rejected need a prompt beside them: they are no whole conversations, and there is none."""
    if row.get("prompt") is not None or is_dialogue(row["chosen"]):
        return False
    first = [v[0] if isinstance(v, list | tuple) and v else v for v in (row["chosen"], row["rejected"])]
    speakers = [turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else "assistant" for turn in first]
    return all(speaker in ("assistant", "gpt") for speaker in speakers)


def are_dialogues(row: Row) -> bool:
    """Whether chosen and rejected are texts that begin with "Human:"."""
    return is_dialogue(row["chosen"]) and is_dialogue(row["rejected"])


def are_turns(row: Row) -> bool:
    """Whether chosen and rejected are lists of turns {from, value}."""
    return not isinstance(row["chosen"], str) and is_turns(row["chosen"]) and is_turns(row["rejected"])
