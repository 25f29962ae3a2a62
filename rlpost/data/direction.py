"""Reversed text, for models that predict from the end: p(x) = Π p(x_t | x_>t)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpost.data.codec import Codec
from rlpost.data.visible import visible
from rlpost.errors import DataError
from rlpost.types import Completion, Group


def backwards(group: Group, codec: Codec) -> Group:
    """A prompt and its completion as one reversed text, all of which is learned.

    The reversed text still begins with the begin token and ends with the end token, so that the model is sampled, saved
    and scored as any other. Without a begin token the text's own last token is the prompt.
    Example: begin, "1+2=", "3", end becomes begin, "3=2+1", end.
    """
    (completion,) = group.completions
    before, after = group.prompt, completion.ids
    begin = codec.tokenizer.bos_token_id
    if begin is not None and before[0] == begin:
        before = before[1:]
    if after[-1] == codec.end:
        after = after[:-1]
    ids = [*np.concatenate([before, after])[::-1].tolist(), codec.end]
    prompt, ids = (ids[:1], ids[1:]) if begin is None else ([begin], ids)
    text = visible(ids, codec.tokenizer, codec.stops)
    return Group(prompt, (Completion(ids, (True,) * len(ids), text),), group.example)


def before_what(after: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """The prompt for a model of reversed text to predict what comes before `after`: begin token, `after` reversed.

    Raises:
        DataError: `after` is empty, and the tokenizer has no begin token.
    """
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    if not begin and not after:
        raise DataError("nothing to read backwards from: the tokenizer has no begin token, so give some text")
    return (*begin, *reversed(after))


def in_reading_order(sampled: Sequence[int], end: int) -> tuple[int, ...]:
    """The sample of a model of reversed text, in reading order, without the end token."""
    return tuple(reversed([token for token in sampled if token != end]))
