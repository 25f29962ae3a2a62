"""Which tokens of an episode an environment or a tool said, and not the chat template around them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlpost.types import Completion

_UNREAD = ("assistant", "opponent")
"""Roles of messages that stand in an episode as the model's own turns, or not at all."""


def reply_tokens(completion: Completion, tokenizer: Any) -> NDArray[np.bool_]:
    """[L] True at tokens of what was replied to the model; none where it has no actions, being left out of learning.

    Of what stands between two turns, those are the tokens of the messages' text, without the role markers that a chat
    template writes. Where the template writes a message otherwise than it was said, all that it wrote counts.
    """
    found = np.zeros(len(completion.ids), np.bool_)
    if not completion.actions:
        return found
    gaps, runs = _gaps(completion), _runs(~completion.action)
    if len(runs) < len(gaps) - 1:  # of plain text an empty reply has left no tokens; a template writes around it
        gaps = [said for said in gaps if any(said)]
    for first, last in runs:
        said = gaps.pop(0) if gaps else []
        if said and not any(said):
            continue
        written = _Written(completion.ids[first:last].tolist(), tokenizer)
        for begin, end in written.spans(said):
            found[first:last] |= (written.first < end) & (written.last > begin)
    return found


class _Written:
    """The text of some tokens, and the characters [first, last) that each of them writes."""

    def __init__(self, ids: Sequence[int], tokenizer: Any) -> None:
        def text(some: Sequence[int]) -> str:
            written: str = tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return written

        self.text = text(ids)
        pieces = [text([i]) for i in ids]
        # A token may be a part of a character, or written otherwise at the beginning of a text.
        whole = "".join(pieces) == self.text
        ends = list(accumulate(map(len, pieces))) if whole else [len(text(ids[: n + 1])) for n in range(len(ids))]
        starts = [0, *ends[:-1]]
        for n in range(1, len(ids)):
            if starts[n] == ends[n]:  # it ends a character that an earlier token began
                starts[n] = starts[n - 1]
        self.first, self.last = np.array(starts), np.array(ends)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        marks = [(first, last) for i, first, last in zip(ids, self.first, self.last, strict=True) if i in special]
        lines = [i for i, c in enumerate(self.text) if c == "\n"]
        self._begins = {0, *(i + 1 for i in lines), *(last for _, last in marks)}
        self._ends = {len(self.text): 2, **dict.fromkeys(lines, 1), **{first: 2 for first, _ in marks}}

    def spans(self, said: Sequence[str]) -> list[tuple[int, int]]:
        """Where messages stand, in order; all of the text where one of them is not found, or there is none."""
        spans, at = list[tuple[int, int]](), 0
        for one in filter(str.strip, said):
            one = one if one in self.text[at:] else one.strip()  # many templates trim
            found = [i for i in range(at, len(self.text)) if self.text.startswith(one, i)]
            if not found:
                return [(0, len(self.text))]
            # A short message may be in the name of a role by chance; its own place has the template's marks around it.
            length = len(one)
            begin = max(found, key=lambda i: (i in self._begins) + self._ends.get(i + length, 0))
            at = begin + length
            spans.append((begin, at))
        return spans or [(0, len(self.text))]


def _gaps(completion: Completion) -> list[list[str]]:
    """What was said after each of the model's turns."""
    gaps: list[list[str]] = []
    for message in completion.messages:
        if message["role"] == "assistant":
            gaps.append([])
        elif message["role"] not in _UNREAD and gaps:
            gaps[-1].append(str(message["content"]))
    return gaps


def _runs(mask_L: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The stretches [first, last) in which it is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask_L, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
