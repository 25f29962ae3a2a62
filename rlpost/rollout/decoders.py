"""One token a row at a time through the model: with shared prompts, or as padded rows for any family.

Axes: P prompts, B rows (live completions), W prompt columns, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from rlpost.policy.layout import Segment, flat_layout
from rlpost.rollout.cache import PromptedLayer, PromptedLayout

PREFILL_TOKENS = 8192
"""Prompt tokens of one flat prefill pass; a longer prompt has a pass of its own."""


class Decoder(Protocol):
    """Rows that continue prompts."""

    def start(self) -> Tensor:
        """[B, V] logits of each row's first token."""
        ...

    def step(self, ids_B: Tensor) -> Tensor:
        """[B, V] logits after one more token a row."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Only these rows (ascending) go on."""
        ...


class FlatDecoder:
    """Prompts run as one flat row, and stay in the cache once, however many rows continue them."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int], limit: int) -> None:
        """Prepare to decode at most `limit` tokens a row.

        Args:
            model: a transformers causal language model whose attention follows a layout.
            prompts: token ids.
            prompt_of_row: [B] the prompt each row continues, ascending, none left out.
            limit: tokens.
        """
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.prompts = prompts
        widths = [len(p) for p in prompts]
        self.layout = PromptedLayout(widths, prompt_of_row, limit, self.device)
        self.cache = Cache(layer_class_to_replicate=partial(PromptedLayer, self.layout))
        self.prompt_of_row = torch.tensor(prompt_of_row, device=self.device)
        self.position_B = torch.tensor(widths, device=self.device)[self.prompt_of_row]

    def start(self) -> Tensor:
        """[B, V] logits of each row's first token."""
        last = torch.cat([self._prefill(prompts) for prompts in _passes(self.prompts)])
        widths = np.array([len(p) for p in self.prompts])
        behind = np.cumsum(widths)[:, None] - np.arange(self.layout.width, 0, -1)
        index = torch.from_numpy(np.maximum(behind, 0)).to(self.device)
        for layer in self.cache.layers:
            layer.arrange(index)
        self.layout.prefilling = False
        return last[self.prompt_of_row]

    def step(self, ids_B: Tensor) -> Tensor:
        """[B, V] logits after one more token a row."""
        self.layout.length += 1
        logits: Tensor = self._forward(ids_B[:, None], self.position_B[:, None], self.layout, 1)[:, -1]
        self.position_B = self.position_B + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Only these rows (ascending) go on."""
        prompts = self.layout.keep(rows.cpu().numpy())
        for layer in self.cache.layers:
            layer.keep(rows, prompts)
        self.position_B = self.position_B[rows]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """[P, V] logits after each prompt; the cache takes their keys and values."""
        ends = np.cumsum([len(p) for p in prompts])
        segments = [Segment(int(end) - len(p), len(p)) for p, end in zip(prompts, ends, strict=True)]
        ids = np.concatenate([np.asarray(p, np.int64) for p in prompts])
        position = np.concatenate([np.arange(len(p)) for p in prompts])
        layout = flat_layout(segments, len(ids)).to(self.device)
        return self._forward(self._row(ids), self._row(position), layout, self._row(ends - 1)[0])[0]

    def _forward(self, ids: Tensor, position: Tensor, layout: Any, keep: int | Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            layout=layout,
        ).logits
        return logits

    def _row(self, x: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(x)[None].to(self.device)


class PaddedDecoder:
    """Left-padded rows with transformers' own cache and mask."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int], limit: int) -> None:
        """Prepare to decode at most `limit` tokens a row; arguments as of `FlatDecoder`."""
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self.cache = DynamicCache(config=model.config)
        self.width = max(len(p) for p in prompts)
        ids = np.zeros((len(prompts), self.width), np.int64)
        mask = np.ones((len(prompts), self.width + limit), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) :] = prompt
            mask[row, : self.width - len(prompt)] = 0
        self.ids_PW = torch.from_numpy(ids).to(self.device)
        # One mask for all steps, each of which sees a slice of it.
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
        """Only these rows go on."""
        # Unlike `batch_select_indices`, every kind of cache layer in transformers has this.
        self.cache.reorder_cache(rows)
        self.mask, self.position_B = self.mask[rows], self.position_B[rows]

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        optional = {"position_ids": position, "logits_to_keep": 1}
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=self.mask[:, : self.width],
            past_key_values=self.cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self.takes},
        ).logits
        return logits[:, -1]


def _passes(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Neighbouring prompts within the token budget of a pass."""
    bunch: list[Sequence[int]] = []
    for prompt in prompts:
        if bunch and sum(map(len, bunch)) + len(prompt) > PREFILL_TOKENS:
            yield bunch
            bunch = []
        bunch.append(prompt)
    yield bunch
