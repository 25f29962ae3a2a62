"""Restricts logits to the tokens that the tokenizer knows.

Many models embed more rows than their tokenizer has tokens. Such a row stands for no text, so it is never sampled, and
it has no part in log-probabilities either: scores are of the distribution that is sampled from.

Axes: V rows of the head, K tokens known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlpost.devices import moved

NEVER = -1e30
"""The logit of an unused id: its probability is exactly 0, and so is 0 times its logarithm."""


class Vocabulary:
    """Cuts logits to the known tokens."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        """Read the tokenizer's ids.

        Args:
            tokenizer: of transformers; one that lists no tokens is taken to know every row.
            rows: V.
        """
        known = set(tokenizer.get_vocab().values()) if hasattr(tokenizer, "get_vocab") else set(range(rows))
        self.size = min(rows, 1 + max(known, default=rows - 1))
        """K: one more than the largest id."""
        self._cut = self.size < rows
        gaps = [i for i in range(self.size) if i not in known]
        self._gaps = torch.tensor(gaps, dtype=torch.long)
        self.unused = (*gaps, *range(self.size, rows))
        """Ids of rows that stand for no token."""

    def cut(self, logits: Tensor) -> Tensor:
        """[..., V] logits -> [..., K], with `NEVER` at unused ids."""
        if self._cut:
            logits = logits[..., : self.size]
        if len(self._gaps):
            logits = logits.index_fill(-1, moved(self._gaps, logits.device), NEVER)
        return logits
