"""Encodes many plain-text rows at once; unusual rows are left to the encoder of single rows.

Axes: R rows, U different texts, K texts of a row: its prompt, then its completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlpost.data.batch import Pieces
from rlpost.data.codec import Codec
from rlpost.data.flat import Block, texts
from rlpost.data.formats import Format
from rlpost.data.messages import SYSTEM

Row = Mapping[str, Any]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

_COLUMNS = {
    Format.prompt: ("prompt",),
    Format.completion: ("prompt", "completion"),
    Format.pair: ("prompt", "chosen", "rejected"),
    Format.triple: ("prompt", "chosen", "rejected", "reference"),
}
"""Formats that are encoded here."""


@dataclass(frozen=True)
class _Texts:
    """Distinct texts, tokenised."""

    texts: list[str]
    ids: Pieces
    odd_U: Flags
    """True for texts that need the encoder of single rows."""


class Plain:
    """Plain-text rows, tokenised together."""

    def __init__(self, rows: Sequence[Row], form: Format, codec: Codec, max_length: int) -> None:
        """Tokenise the rows of an `is_supported` format; those over `max_length` tokens are not `clean`."""
        columns = _COLUMNS[form]
        self._codes_RK = np.stack([np.zeros(len(rows), np.int64)] * len(columns), 1)
        prompts: dict[str, int] = {}
        completions: dict[str, int] = {}
        for k, column in enumerate(columns):
            self._codes_RK[:, k] = _numbered(rows, column, prompts if k == 0 else completions)
        prompt_texts = _tokenised(list(prompts), codec, begin=codec.begin)
        answers = _tokenised(list(completions), codec, end=codec.end)
        self._answer_texts = texts([text.removesuffix(codec.tokenizer.eos_token) for text in answers.texts])
        there_RK = self._codes_RK >= 0
        self._codes_RK[:, 1:] += len(prompts)
        self._ids = Pieces(
            np.concatenate([prompt_texts.ids.flat_T, answers.ids.flat_T]),
            np.concatenate([prompt_texts.ids.lengths_U, answers.ids.lengths_U]),
        )
        self._prompts = len(prompts)
        odd_U = np.concatenate([prompt_texts.odd_U, answers.odd_U, [True]])  # the last one is for columns without text
        codes_RK = np.where(there_RK, self._codes_RK, -1)
        lengths_RK = np.concatenate([self._ids.lengths_U, [0]])[codes_RK]
        length_R = lengths_RK[:, 0] + (lengths_RK[:, 1:].max(1) if len(columns) > 1 else 0)
        is_pair = form in (Format.pair, Format.triple)
        more = ("tools", "margin") if is_pair else ("tools",)
        no_more_R = np.array(
            [not any(row.get(c) is not None for c in more) and not any(row.get(c) for c in SYSTEM) for row in rows],
            np.bool_,
        )
        no_more_R &= not codec.tools  # which are told of in conversations
        self.clean: Flags = ~_any(odd_U[codes_RK]) & (length_R <= max_length) & no_more_R
        """[R] True for rows that are encoded here."""
        if is_pair:
            same_U = np.concatenate([_alike(self._ids), [-1]])
            self.clean &= same_U[codes_RK[:, 1]] != same_U[codes_RK[:, 2]]
        stop = "" if codec.template is None else codec.template.stop
        stopped_U = np.array(
            [bool(stop) and stop in text for text in (*prompt_texts.texts, *answers.texts, "")], np.bool_
        )
        self.unformatted: Flags = ~_any(stopped_U[codes_RK])
        """[R] True where the chat template's stop token is in none of the texts."""

    def block(self, which: Ints, lines: Sequence[bytes], numbers: Sequence[int]) -> Block:
        """A block of some rows, all of them clean."""
        codes = self._codes_RK[which]
        pieces = np.full(len(which), codes.shape[1], np.int64)
        own = {"text": self._answer_texts.take(codes[:, 1:].ravel() - self._prompts)} if codes.shape[1] > 1 else {}
        return Block(lines, numbers, pieces, self._ids.take(codes.ravel()), own=own)


def is_supported(form: Format) -> bool:
    """Whether rows of a format can be encoded here."""
    return form in _COLUMNS


def _any(flags_RK: Flags) -> Flags:
    """[R] whether any of a row's flags is true."""
    return np.asarray(flags_RK.any(axis=1))


def _numbered(rows: Sequence[Row], column: str, known: dict[str, int]) -> list[int]:
    """[R] the index of each row's text in `known`, -1 without text; adds to `known`."""
    found = [row.get(column) for row in rows]
    return [known.setdefault(text, len(known)) if type(text) is str and text else -1 for text in found]


def _tokenised(given: list[str], codec: Codec, begin: tuple[int, ...] = (), end: int | None = None) -> _Texts:
    """The texts, with the begin token before or the end token after each unless it is there already."""
    ids = codec.all_ids(given)
    count, lengths, flat = len(given), ids.lengths_U, ids.flat_T
    owner = np.repeat(np.arange(count), lengths)
    odd = lengths == 0
    unknown = codec.tokenizer.unk_token_id
    if unknown is not None:
        odd |= np.bincount(owner[flat == unknown], minlength=count) > 0
    some, ends = lengths > 0, np.cumsum(lengths)
    if end is not None:
        ended = np.zeros(count, np.bool_)
        ended[some] = flat[ends[some] - 1] == end
        odd |= np.bincount(owner[flat == end], minlength=count) > ended
        flat, lengths = np.insert(flat, ends[~ended], end), lengths + ~ended
    if begin:
        begun = np.zeros(count, np.bool_)
        begun[some] = flat[(ends - lengths)[some]] == begin[0]
        flat, lengths = np.insert(flat, (ends - lengths)[~begun], begin[0]), lengths + ~begun
    return _Texts(given, Pieces(flat, lengths), odd)


def _alike(ids: Pieces) -> Ints:
    """[U] a number for each piece, the same for equal pieces."""
    known: dict[bytes, int] = {}
    flat, ends = ids.flat_T, ids.ends_U.tolist()
    pieces = (flat[end - n : end].tobytes() for end, n in zip(ends, ids.lengths_U.tolist(), strict=True))
    return np.array([known.setdefault(piece, len(known)) for piece in pieces], np.int64)
