"""Decoding on left-padded rows, which almost every transformers model can.

Axes: P prompts, B rows (live completions), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rlpost.types import Tokens

Run = Callable[..., Any]
"""Inputs of a transformers model by name -> its output."""


class PaddedDecoder:
    """Left-padded rows with transformers' own cache and mask."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Tokens],
        prompt_of_row: Sequence[int],
        limit: int,
        *,
        run: Run | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Prepare to decode at most `limit` tokens a row; arguments as of `FlatDecoder`."""
        self._run = run or model
        self.device = device or model.get_input_embeddings().weight.device
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self.cache = DynamicCache(config=model.config)
        # Models without attention have another name for their cache, and silently ignore one by the usual name.
        self.cache_name = "cache_params" if "cache_params" in self.takes else "past_key_values"
        self.width = max(len(p) for p in prompts)
        ids = np.zeros((len(prompts), self.width), np.int64)
        mask = np.ones((len(prompts), self.width + limit), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) :] = prompt
            mask[row, : self.width - len(prompt)] = 0
        self.ids_PW = torch.from_numpy(ids).to(self.device)
        # One mask for all steps; each takes a slice of it.
        self.mask = torch.from_numpy(mask).to(self.device)
        self.position_B = torch.zeros(0)
        self.prompt_of_row = torch.tensor(prompt_of_row, device=self.device)

    def start(self) -> Tensor:
        """[B, V] logits of each row's first token."""
        position = (self.mask[:, : self.width].cumsum(1) - 1).clamp(min=0)
        logits = self._forward(self.ids_PW, position)
        self.position_B = position[:, -1]
        self.keep(self.prompt_of_row)
        return logits[self.prompt_of_row]

    def step(self, ids_B: Tensor) -> Tensor:
        """[B, V] logits after one more token a row."""
        self.width += 1
        self.position_B = self.position_B + 1
        return self._forward(ids_B[:, None], self.position_B[:, None])

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only."""
        # Unlike `batch_select_indices`, every cache layer of transformers has this.
        self.cache.reorder_cache(rows)
        self.mask, self.position_B = self.mask[rows], self.position_B[rows]

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        optional = {"position_ids": position, "logits_to_keep": 1}
        logits: Tensor = self._run(
            input_ids=ids,
            attention_mask=self.mask[:, : self.width],
            use_cache=True,
            **{self.cache_name: self.cache},
            **{name: value for name, value in optional.items() if name in self.takes},
        ).logits
        return logits[:, -1]
