"""Tokenises many texts at once, to the same ids as one by one.

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
class Pieces:
    """Arrays of different lengths, concatenated."""

    flat_T: NDArray[Any]
    lengths_U: Ints

    @property
    def ends_U(self) -> Ints:
        """The end of each piece."""
        return np.cumsum(self.lengths_U)

    def take(self, which: Ints) -> Pieces:
        """The pieces with these indices, in this order; an index may repeat."""
        lengths = self.lengths_U[which]
        shift = (self.ends_U - self.lengths_U)[which] - (np.cumsum(lengths) - lengths)
        return Pieces(self.flat_T[np.repeat(shift, lengths) + np.arange(lengths.sum())], lengths)

    def split(self) -> list[tuple[int, ...]]:
        """Each piece as a tuple."""
        flat, ends = self.flat_T.tolist(), self.ends_U.tolist()
        return [tuple(flat[end - n : end]) for end, n in zip(ends, self.lengths_U.tolist(), strict=True)]


def concatenated(pieces: Sequence[Sequence[int]], kind: Any = np.int32) -> Pieces:
    """The pieces, concatenated."""
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return Pieces(np.fromiter(chain.from_iterable(pieces), kind, int(lengths.sum())), lengths)


class Batched:
    """Encodes many texts at once with a tokenizer of transformers.

    The fastest way is compared with one-by-one encoding on the first texts, and given up if they differ.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ways: list[Way] = [self._one_by_one]
        if getattr(tokenizer, "is_fast", False):
            self._ways.append(self._together)
            characters = _characters(tokenizer, self._together)
            self._ways += [characters] if characters is not None else []
        self._proved = False

    def __call__(self, texts: Sequence[str]) -> Pieces:
        """The ids of each text, nothing added."""
        if not self._proved and texts:
            some = texts[:_PROVED_ON]
            wanted = self._one_by_one(some).split()
            while self._ways[-1](some).split() != wanted:
                self._ways.pop()
            self._proved = True
        return self._ways[-1](texts)

    def _one_by_one(self, texts: Sequence[str]) -> Pieces:
        return concatenated([self._tokenizer.encode(text, add_special_tokens=False) for text in texts])

    def _together(self, texts: Sequence[str]) -> Pieces:
        # Resets the tokenizer to how it encodes one text: without padding, truncation, or special rules.
        self._tokenizer.encode("", add_special_tokens=False)
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return concatenated([e.ids for e in encoded])


Way = Callable[[Sequence[str]], Pieces]


def _characters(tokenizer: Any, otherwise: Way) -> Way | None:
    """A look-up table, for tokenizers whose tokens are single characters; None for others.

    Texts that contain a special token are left to `otherwise`.
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

    def look_up(texts: Sequence[str]) -> Pieces:
        text = "".join(texts)
        if any(word in text for word in words):
            return otherwise(texts)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        return Pieces(table[np.minimum(points, len(table) - 1)], np.fromiter(map(len, texts), np.int64, len(texts)))

    return look_up
