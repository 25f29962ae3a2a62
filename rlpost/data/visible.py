"""The text of token ids, as rewards, pairs and people read it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def visible(ids: Sequence[int], tokenizer: Any, ends: Collection[int]) -> str:
    """The text of `ids` without the tokens in `ends`, which end a completion or a turn.

    Other special tokens are kept by name: `<think>` and `</think>` stay in the text, whether or not the tokenizer
    declares them special.
    """
    return str(tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=False))
