"""The text that token ids stand for, as rewards, pairs and people read it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def visible(ids: Sequence[int], tokenizer: Any, ends: Collection[int]) -> str:
    """The text of `ids` without the tokens in `ends`, which end a completion or a turn.

    Other special tokens keep their names: what a model writes between `<think>` and `</think>` can be told from its
    answer, whether or not the tokenizer declares those two special.
    """
    return str(tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=False))
