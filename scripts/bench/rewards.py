"""A reward of both sides that costs nothing: the share of short words."""

from collections.abc import Sequence
from typing import Any


def _share(text: str) -> float:
    words = text.split()
    return sum(len(w) <= 3 for w in words) / max(1, len(words))


def words(completion: Any) -> float:
    """Of one completion, as rlpost asks."""
    return _share(completion.text)


def words_of_all(completions: Sequence[str], **_: Any) -> list[float]:
    """Of some, as TRL asks."""
    return [_share(c) for c in completions]
