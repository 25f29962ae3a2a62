"""The tokens a policy can write: those its tokenizer knows.

Many models embed more rows than their tokenizer has tokens. What such a row would stand for is no text: it is never
drawn, and since what is scored is the distribution that is drawn from, it has no part in any log-probability either.

Axes: V rows of the head, K tokens known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEVER = -1e30
"""The logit of an id between tokens that is none: its probability is 0 exactly, and 0 times its logarithm is 0."""


class Vocabulary:
    """Cuts logits to the tokens that there are."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        """Look at the tokenizer once.

        Args:
            tokenizer: of transformers; one that lists no tokens is taken to know every row.
            rows: V.
        """
        known = set(tokenizer.get_vocab().values()) if hasattr(tokenizer, "get_vocab") else set(range(rows))
        self.size = min(rows, 1 + max(known, default=rows - 1))
        """K: one more than the largest id."""
        self._cut = self.size < rows
        self._gaps = torch.tensor([i for i in range(self.size) if i not in known], dtype=torch.long)

    def cut(self, logits: Tensor) -> Tensor:
        """[…, V] logits -> [..., K], and `NEVER` at ids between tokens."""
        if self._cut:
            logits = logits[..., : self.size]
        if len(self._gaps):
            logits = logits.index_fill(-1, self._gaps.to(logits.device), NEVER)
        return logits
