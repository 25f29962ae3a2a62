"""Stop strings, and the text of completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlpost.data.visible import visible
from rlpost.types import Completion, Tokens

BYTES_A_CHARACTER = 4
"""Most tokens of a character: one for each byte of its UTF-8 form."""
MARGIN = 8
"""Tokens decoded in front of the longest stop string: decoding from the middle may lose the first piece."""


class StopStrings:
    """Texts that end a completion when they appear in it."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = [s for s in stop if s]
        self.tail = BYTES_A_CHARACTER * max(map(len, self.stop), default=0) + MARGIN
        """How many last tokens `hit` needs to see."""

    def __bool__(self) -> bool:
        return bool(self.stop)

    def hit(self, tail: Sequence[int]) -> bool:
        """Whether the last tokens of a completion contain a stop string; special tokens are read by their names."""
        text = self.tokenizer.decode(list(tail), skip_special_tokens=False)
        return any(s in text for s in self.stop)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        ends = [at for s in self.stop if (at := text.find(s)) >= 0]
        return text[: min(ends)] if ends else text


def finished(
    ids: Tokens,
    logprobs: ArrayLike,
    ended: bool,
    end_ids: Sequence[int],
    stops: StopStrings,
    version: int | None = None,
) -> Completion:
    """A sampled completion.

    Args:
        ids: its tokens, through the one that ended it.
        logprobs: their log-probabilities.
        ended: an end token or a stop string ended it, and not the length limit.
        end_ids: the tokens that end a completion; the text leaves them out.
        stops: the text ends before the first of these.
        version: of the weights.
    """
    text = stops.cut(visible(np.asarray(ids).tolist(), stops.tokenizer, end_ids))
    finish = "stop" if ended else "length"
    return Completion(ids, _all_actions(len(ids)), text, finish, logprobs, weights_version=version)


@cache
def _all_actions(length: int) -> NDArray[np.bool_]:
    """Read-only, so that completions share it: a step makes thousands."""
    array = np.ones(length, np.bool_)
    array.setflags(write=False)
    return array
