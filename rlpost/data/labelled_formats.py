"""Encoders of rows with labels, scores of several answers, step labels, or recorded rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlpost.data.codec import Codec
from rlpost.data.columns import missing
from rlpost.data.encoders import (
    Row,
    as_messages,
    conversation,
    encode_answered,
    encode_pair,
    plain_completion,
    plain_prompt,
    prompt_ids,
)
from rlpost.errors import DataError
from rlpost.types import Completion, Group

_TRUE = ("true", "1", "yes", "good", "desirable", "thumbs up")
_FALSE = ("false", "0", "no", "bad", "undesirable", "thumbs down")


def encode_labelled(row: Row, codec: Codec, location: str) -> Group:
    """`prompt, completion, label`: one completion with its `label`.

    Raises:
        DataError: the label is neither true nor false.
    """
    if "label" not in row:
        raise DataError(f"{location} {missing('label', row)}")
    given = row["label"]
    word = str(given).strip().lower().replace("_", " ")
    if isinstance(given, float) or word not in (*_TRUE, *_FALSE):
        raise DataError(f"{location}: 'label' is {given!r:.40}, neither true (desirable) nor false")
    group = encode_answered(row, codec, location)
    return replace(group, completions=tuple(replace(c, label=word in _TRUE) for c in group.completions))


def encode_ranked(row: Row, codec: Codec, location: str) -> Group:
    """`prompt, completions, scores`: K completions, each with its `score`; of a pair, 1 (chosen) and 0 (rejected).

    Raises:
        DataError: the lists do not fit together, or all scores are equal.
    """
    if "completions" not in row:
        return _ranked(encode_pair(row, codec, location), (1.0, 0.0))
    answers, scores = _list(row, "completions", location), _list(row, "scores", location)
    if len(answers) != len(scores):
        raise DataError(f"{location}: {len(answers)} completions have {len(scores)} scores; give one for each")
    numbers = [None if s is None else _number(s, f"scores[{i}]", location) for i, s in enumerate(scores)]
    if len({s for s in numbers if s is not None}) < 2:
        raise DataError(f"{location}: a ranking needs two completions of different scores; leave the row out")
    return _ranked(encode_several(row, codec, location), numbers)


def _ranked(group: Group, scores: Sequence[float | None]) -> Group:
    scored = tuple(replace(c, score=score) for c, score in zip(group.completions, scores, strict=True))
    return replace(group, completions=scored)


def encode_several(row: Row, codec: Codec, location: str) -> Group:
    """`prompt, completions`: K completions that share their prompt.

    Raises:
        DataError: there is none, or their prompts are not one.
    """
    answers = _list(row, "completions", location)
    encoded = [_answer(row, answer, codec, f"{location}, completions[{i}]") for i, answer in enumerate(answers)]
    prompts = {prompt for prompt, _ in encoded}
    if len(prompts) != 1:
        what = "the chat template gives its completions different prompts" if prompts else "it has no completions"
        raise DataError(f"{location}: {what}")
    return Group(encoded[0][0], tuple(c for _, c in encoded), row)


def encode_steps(row: Row, codec: Codec, location: str) -> Group:
    """`prompt, steps, labels`: one completion of these steps, tokenised separately, with `step_labels`; no end token.

    Raises:
        DataError: the lists do not fit together, a step is empty, or a label is not from 0 to 1.
    """
    texts, labels = _list(row, "steps", location), _list(row, "labels", location)
    if len(texts) != len(labels) or not texts:
        raise DataError(
            f"{location}: {len(texts)} steps have {len(labels)} labels; give at least one step, and each one"
        )
    numbers = [_number(x, f"labels[{i}]", location) for i, x in enumerate(labels)]
    for i, x in enumerate(numbers):
        if not 0 <= x <= 1:
            raise DataError(f"{location}: labels[{i}] is {x:g}; a step is wrong (0) or right (1), or something between")
    ids: list[int] = []
    lengths = []
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise DataError(f"{location}: steps[{i}] is {text!r:.40}, not text")
        piece = codec.ids(text, f"{location}, steps[{i}]")
        ids += piece
        lengths.append(len(piece))
    completion = Completion(ids, (True,) * len(ids), "".join(texts), steps=lengths, step_labels=numbers)
    return Group(prompt_ids(row, codec, location), (completion,), row)


def encode_recorded(row: Row, codec: Codec, location: str) -> Group:
    """A line of rollouts/*.jsonl as it was sampled, each completion with its `reward`.

    Raises:
        DataError: its parts do not fit together, or its ids are not in the vocabulary.
    """
    prompt = _ids(_list(row, "prompt", location), codec, f"{location}, prompt")
    example = row.get("example") or {}
    given = _list(row, "completions", location)
    if not prompt or not given or not isinstance(example, Mapping):
        raise DataError(
            f"{location}: a recorded rollout has a prompt, completions, and the row they are about as `example`"
        )
    completions = []
    for i, c in enumerate(given):
        where = f"{location}, completions[{i}]"
        if not isinstance(c, Mapping) or not {"ids", "action", "logprobs"} <= set(c):
            raise DataError(f"{where} needs ids, action and logprobs, as rollouts/*.jsonl has them")
        ids = _ids(_list(c, "ids", where), codec, where)
        action = tuple(_flag(a, where) for a in _list(c, "action", where))
        logprobs = tuple(_number(x, "logprobs", where) for x in _list(c, "logprobs", where))
        if len(action) != len(ids) or len(logprobs) != sum(action):
            raise DataError(
                f"{where}: {len(ids)} ids, {len(action)} flags of action and {len(logprobs)} logprobs for "
                f"{sum(action)} actions do not fit together"
            )
        text, finish = (_text(c, key, where) for key in ("text", "finish"))
        reward = None if c.get("reward") is None else _number(c["reward"], "reward", where)
        steps, given = (
            tuple(_number(x, key, where) for x in _list({key: c.get(key) or ()}, key, where))
            for key in ("steps", "step_rewards")
        )
        if sum(steps) not in (0, sum(action)) or len(given) not in (0, len(steps)):
            raise DataError(f"{where}: {len(given)} step_rewards and steps of {sum(steps)} actions do not fit together")
        lengths = [int(x) for x in steps]
        completions.append(Completion(ids, action, text, finish, logprobs, lengths, reward=reward, step_rewards=given))
    return Group(prompt, completions, example)


def check_margin(row: Row, location: str) -> None:
    """Check the optional `margin` of a pair.

    Raises:
        DataError: it is not a number.
    """
    if row.get("margin") is not None:
        _number(row["margin"], "margin", location)


def _answer(row: Row, answer: Any, codec: Codec, location: str) -> tuple[tuple[int, ...], Completion]:
    if isinstance(answer, str) and isinstance(row.get("prompt"), str):
        return plain_prompt(row["prompt"], codec, location), plain_completion(answer, codec, location)
    prompt = as_messages(row.get("prompt"), "user", f"{location}, prompt")
    answered = as_messages(answer, "assistant", location)
    return conversation(row, prompt + answered, len(prompt), codec, location)


def _list(row: Row, column: str, location: str) -> Sequence[Any]:
    value = row.get(column)
    if not isinstance(value, list | tuple):
        raise DataError(f"{location}: {column!r} is {type(value).__name__}, not a list")
    return value


def _number(value: Any, what: str, location: str) -> float:
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{location}: {what} is {value!r:.40}, not a finite number")
    return float(value)


def _flag(value: Any, location: str) -> bool:
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise DataError(f"{location}: action has {value!r:.40}, neither 1 (the policy chose the token) nor 0")
    return bool(value)


def _text(row: Row, column: str, location: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | None):
        raise DataError(f"{location}: {column!r} is {type(value).__name__}, not text")
    return value or ""


def _ids(value: Sequence[Any], codec: Codec, location: str) -> tuple[int, ...]:
    vocabulary = len(codec.tokenizer)
    for i in value:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocabulary:
            raise DataError(
                f"{location}: token {i!r:.20} is not one of the tokenizer's {vocabulary}; record with this model's"
            )
    return tuple(value)
