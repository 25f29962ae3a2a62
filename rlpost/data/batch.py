"""Many texts tokenised at once, to the same ids as one by one.

Axes: U texts, T tokens of all of them together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_PROVED_ON = 8


@dataclass(frozen=True)
class Ragged:
    """Pieces of different lengths, one after the other."""

    flat_T: NDArray[Any]
    lengths_U: Ints

    @property
    def ends_U(self) -> Ints:
        """Where each piece ends."""
        return np.cumsum(self.lengths_U)

    def take(self, which: Ints) -> Ragged:
        """The pieces of these numbers, in their order; a piece may come again."""
        lengths = self.lengths_U[which]
        shift = (self.ends_U - self.lengths_U)[which] - (np.cumsum(lengths) - lengths)
        return Ragged(self.flat_T[np.repeat(shift, lengths) + np.arange(lengths.sum())], lengths)

    def pieces(self) -> list[tuple[int, ...]]:
        """Each piece by itself."""
        flat, ends = self.flat_T.tolist(), self.ends_U.tolist()
        return [tuple(flat[end - n : end]) for end, n in zip(ends, self.lengths_U.tolist(), strict=True)]


def ragged(pieces: Sequence[Sequence[int]], kind: Any = np.int32) -> Ragged:
    """Pieces, put one after the other."""
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return Ragged(np.fromiter(chain.from_iterable(pieces), kind, int(lengths.sum())), lengths)


class Batched:
    """A tokenizer of transformers that is asked for many texts at once.

    It is proved on its first texts: where many together would not get the ids that each gets alone, they are asked
    one by one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ways: list[Way] = [self._one_by_one]
        if getattr(tokenizer, "is_fast", False):
            self._ways.append(self._together)
            characters = _characters(tokenizer, self._together)
            self._ways += [characters] if characters is not None else []
        self._proved = False

    def __call__(self, texts: Sequence[str]) -> Ragged:
        """The ids of each text, nothing added."""
        if not self._proved and texts:
            some = texts[:_PROVED_ON]
            wanted = self._one_by_one(some).pieces()
            while self._ways[-1](some).pieces() != wanted:
                self._ways.pop()
            self._proved = True
        return self._ways[-1](texts)

    def _one_by_one(self, texts: Sequence[str]) -> Ragged:
        return ragged([self._tokenizer.encode(text, add_special_tokens=False) for text in texts])

    def _together(self, texts: Sequence[str]) -> Ragged:
        # Leaves the tokenizer as it is when it encodes one text: without padding, truncation, or special rules.
        self._tokenizer.encode("", add_special_tokens=False)
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return ragged([e.ids for e in encoded])


Way = Callable[[Sequence[str]], Ragged]


def _characters(tokenizer: Any, otherwise: Way) -> Way | None:
    """For tokenizers that give every character an id of its own, and do nothing else: a table to look them up.

    Texts that name a special token are left to `otherwise`.
    """
    backend = tokenizer.backend_tokenizer
    unknown = tokenizer.unk_token_id
    if type(backend.model).__name__ != "WordLevel" or unknown is None:
        return None
    made = json.loads(backend.to_str())
    apart = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    if made["pre_tokenizer"] != apart or made["normalizer"] or made["model"]["unk_token"] != tokenizer.unk_token:
        return None
    words = tuple(token["content"] for token in made["added_tokens"])
    letters = {ord(c): i for c, i in made["model"]["vocab"].items() if len(c) == 1}
    table = np.full(max(letters, default=0) + 2, unknown, np.int32)
    table[list(letters)] = list(letters.values())

    def look_up(texts: Sequence[str]) -> Ragged:
        text = "".join(texts)
        if any(word in text for word in words):
            return otherwise(texts)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        return Ragged(table[np.minimum(points, len(table) - 1)], np.fromiter(map(len, texts), np.int64, len(texts)))

    return look_up
