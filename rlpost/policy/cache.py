"""The key/value cache of decoding: every prompt once, and the tokens of each of its completions.

All rows are at the same step, and prompts are stored with their ends aligned. So a key's distance from the
query is the same in every row: a sliding window is a slice, and the one mask there is (the padding before
shorter prompts) never changes between steps.

Axes: P prompts, B rows (live completions), S slots (rows of a prompt, padded to the most any has), H query
heads, K key heads, R = H/K query heads a key head, W prompt columns, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rlpost.kernels.ops import LINE
from rlpost.kernels.step import Cached, Rows, chunks_of, with_slack
from rlpost.policy.attention import AttentionOptions

FIRST_ROOM = 64
"""Tokens a row has room for at first; doubled when they run out."""


class PromptedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """One layer's keys and values."""

    def __init__(self, layout: PromptedLayout) -> None:
        super().__init__()
        self.layout = layout
        self.number = layout.layers
        """Index of the layer."""
        layout.layers += 1
        self.is_initialized = True
        self.passes: list[tuple[Tensor, Tensor]] = []
        """[K, tokens, D] keys and values of the flat prefill passes."""
        # Keys lie transposed in memory, [.., D, tokens]: a query's product with them is then almost twice as fast.
        self.prompt: tuple[Tensor, Tensor] | None = None
        """[P, K, W, D]"""
        self.own: tuple[Tensor, Tensor] | None = None
        """[rows at the last growth, K, room, D]; of the compiled step, keys are [.., K, room / LINE, D, LINE]."""
        self.latest: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values and return them alone: the layout reads the others from here."""
        stored = storable(key_states), storable(value_states)
        self.layout.current, self.latest = self, (key_states, value_states)
        if self.layout.prefilling:
            self.passes.append((stored[0][0], stored[1][0]))
            return key_states, value_states
        self._make_room(*stored)
        assert self.own is not None
        at = self.layout.length - 1
        for buffer, new in zip(self.own, stored, strict=True):
            buffer[: new.shape[0], :, at] = new[:, :, 0]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns of the cache: the widest prompt and the tokens so far."""
        return self.layout.width + self.layout.length

    def read(self) -> tuple[Tensor, Tensor]:
        """[T, K, D] keys and values of all tokens of the prefill passes."""
        keys, values = (torch.cat([p[side] for p in self.passes], 1).transpose(0, 1) for side in (0, 1))
        return keys, values

    def arrange(self, keys: Tensor, values: Tensor, index_PW: Tensor) -> None:
        """Turn the prefill passes into one padded row a prompt.

        Args:
            keys: [n, K, D] of all tokens of prompts.
            values: the same.
            index_PW: index of each prompt's tokens among them; padding may point anywhere.
        """
        keys, values = keys[index_PW].permute(0, 2, 3, 1), values[index_PW].transpose(1, 2)
        self.prompt = _spacious(keys).mT, _spacious(values)
        self.passes, self.latest = [], None

    def own_tokens(self, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """[n, K, D] keys and values of tokens of some rows: `which` indexes the rows' tokens, concatenated."""
        assert self.own is not None
        length = self.layout.length
        sides = (x.transpose(3, 4).flatten(2, 3) if x.ndim == 5 else x for x in self.own)
        keys, values = (x[rows, :, :length].transpose(1, 2).flatten(0, 1).index_select(0, which) for x in sides)
        return storable(keys), storable(values)

    def keep(self, rows: Tensor, prompts: Tensor | None) -> None:
        """Only these rows (ascending) stay, and these prompts (None: all)."""
        assert self.prompt is not None
        length = self.layout.length
        for buffer in self.own or ():
            used = _places(buffer, length)
            buffer[: len(rows), :, :used] = buffer[rows, :, :used]
        if prompts is not None:
            self.prompt = _spacious(self.prompt[0].mT[prompts]).mT, _spacious(self.prompt[1][prompts])

    def cached(self, rows: int, key_heads: int, width: int, dtype: torch.dtype) -> Cached:
        """The cache with room for the next token of so many rows, for the compiled step."""
        assert self.prompt is not None
        if larger := self._larger_room():
            larger = -(-larger // LINE) * LINE
            blocks = larger // LINE
            self._grow(
                torch.empty(rows, key_heads, blocks, width, LINE, dtype=dtype),
                torch.empty(rows, key_heads, larger, width, dtype=dtype),
            )
        assert self.own is not None
        return Cached(*self.prompt, *self.own)

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        """For one more token of each row; keys and values are like these [B, K, 1, D]."""
        if larger := self._larger_room():
            rows, heads, _, width = key.shape
            keys = key.new_empty(rows, heads, width, larger).mT
            self._grow(keys, value.new_empty(rows, heads, larger, value.shape[3]))

    def _larger_room(self) -> int:
        """Tokens that there must be room for, if there is less than the next one needs; else 0."""
        room = 0 if self.own is None else self.own[1].shape[2]
        if self.layout.length <= room:
            return 0
        return min(self.layout.limit, max(2 * room, FIRST_ROOM))

    def _grow(self, *larger: Tensor) -> None:
        """Keep on in larger buffers."""
        for old, new in zip(self.own or (), larger, strict=False):
            new[:, :, : old.shape[2]] = old[: len(new)]
        keys, values = larger
        self.own = keys, values


def _places(buffer: Tensor, tokens: int) -> int:
    """What so many tokens take of the third axis of a cache."""
    return -(-tokens // LINE) if buffer.ndim == 5 else tokens


class PromptedLayout:
    """Attention of one new token a row to its prompt and to its own tokens; see `attention.Layout`."""

    def __init__(self, widths: Sequence[int], prompt_of_row: Sequence[int], limit: int, device: torch.device) -> None:
        """Lay out rows that continue prompts.

        Args:
            widths: [P] tokens of each prompt.
            prompt_of_row: [B] the prompt each row continues, ascending, none left out.
            limit: the most tokens a row will be given.
            device: where the model is.
        """
        self.limit = limit
        self.width = max(widths)
        self.length = 0
        """Tokens each row has been given, the one being decoded included."""
        self.layers = 0
        """Layers that have a cache so far."""
        self.prefilling = True
        self.current: PromptedLayer | None = None
        """The layer whose cache was updated last: the one that attends next."""
        column = np.arange(self.width)
        short = column < self.width - np.array(widths)[:, None]
        self._begin = (self.width - np.array(widths)).astype(np.int32)
        self._padding = torch.from_numpy(np.where(short, -np.inf, 0.0)).float().to(device) if short.any() else None
        self.device = device
        self._assign_slots(np.asarray(prompt_of_row, np.int64))

    def keep(self, rows: NDArray[np.int64]) -> Tensor | None:
        """Only these rows (ascending) stay; returns the prompts that do, or None if all of them do."""
        staying, prompt_of_row = np.unique(self._prompt_of_row[rows], return_inverse=True)
        everyone = len(staying) == self._prompts
        prompts = None if everyone else torch.from_numpy(staying).to(self.device)
        if prompts is not None and self._padding is not None:
            self._padding = self._padding[prompts]
        self._begin = np.ascontiguousarray(self._begin[staying])
        self._assign_slots(prompt_of_row)
        return prompts

    @property
    def rows(self) -> Rows:
        """Where the rows are, for the compiled step."""
        return Rows(self._chunks, self._begin, self.length)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """[B, 1, H, D]; `key` and `value` are the new ones, the others lie in the cache."""
        layer = self.current
        assert layer is not None
        assert layer.latest is not None
        assert layer.latest[0] is key, "attention must follow its own layer's cache update"
        assert layer.latest[1] is value
        if torch.is_autocast_enabled(query.device.type):
            with torch.autocast(query.device.type, enabled=False):
                return self._attend(layer, query, options)
        return self._attend(layer, query, options)

    def _attend(self, layer: PromptedLayer, query: Tensor, options: AttentionOptions) -> Tensor:
        assert layer.own is not None
        assert layer.prompt is not None
        rows, heads, _, width = query.shape
        key_heads = layer.own[0].shape[1]
        # Columns before `first` are further back than the window; the row's own tokens begin at column W.
        first = 0 if options.window is None else max(0, self.width + self.length - options.window)
        prompt_columns = max(0, self.width - first)
        own_key, own_value = (
            x.flatten(0, 1)[: rows * key_heads, max(0, first - self.width) : self.length] for x in layer.own
        )
        q, factor = scaled(query.to(own_key.dtype).reshape(rows * key_heads, heads // key_heads, width), options)
        scores = product(q, own_key.transpose(1, 2))
        if prompt_columns:
            prompt_key, prompt_value = (x[:, :, first:].flatten(0, 1) for x in layer.prompt)
            shared = product(self._to_slots(q, key_heads), prompt_key.transpose(1, 2))
            scores = self._joined(shared, scores, key_heads)
        weights = self._weights(scores, prompt_columns, factor, options).to(own_value.dtype)
        # The sink's column, if there is one, comes last and has no value.
        end = prompt_columns + own_key.shape[1]
        result = torch.bmm(weights[..., prompt_columns:end], own_value)
        if prompt_columns:
            shared = torch.bmm(self._to_slots(weights[..., :prompt_columns], key_heads), prompt_value)
            result = result + self._to_rows(shared, key_heads)
        return result.reshape(rows, 1, heads, -1).to(query.dtype)

    def _joined(self, shared: Tensor, own: Tensor, key_heads: int) -> Tensor:
        """[B·K, R, W + t] scores of prompts [P·K, S·R, W] and of own tokens [B·K, R, t] in one piece."""
        r, columns = own.shape[1], shared.shape[-1]
        scores = own.new_empty(len(own), r, columns + own.shape[-1])
        scores[..., columns:] = own
        if self._full:
            by_slot = shared.view(self._prompts, key_heads, self._slots, r, columns).transpose(1, 2)
            scores.view(self._prompts, self._slots, key_heads, r, -1)[..., :columns] = by_slot
        else:
            scores[..., :columns] = self._to_rows(shared, key_heads)
        return scores

    def _weights(self, scores: Tensor, prompt_columns: int, factor: float, options: AttentionOptions) -> Tensor:
        """Softmax of scores [B·K, R, columns] times `factor`; the first `prompt_columns` belong to prompts."""
        if factor != 1.0:
            scores.mul_(factor)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if prompt_columns and self._row_padding is not None:
            by_row = scores.view(len(self._prompt_of_row), -1, scores.shape[-1])
            by_row[..., :prompt_columns] += self._row_padding[:, None, -prompt_columns:]
        if options.sinks is not None:
            # Of several queries a head, each has the head's sink.
            queries = scores.shape[0] * scores.shape[1] // (len(self._prompt_of_row) * len(options.sinks))
            sink = options.sinks.to(scores.dtype).repeat_interleave(queries).repeat(len(self._prompt_of_row))
            scores = torch.cat([scores, sink.view(*scores.shape[:2], 1)], -1)
        return scores.softmax(-1)

    def _assign_slots(self, prompt_of_row: NDArray[np.int64]) -> None:
        """Give every row a slot of its prompt."""
        self._prompt_of_row = prompt_of_row
        self._chunks = chunks_of(prompt_of_row)
        counts = np.bincount(prompt_of_row)
        self._prompts, self._slots = len(counts), int(counts.max())
        begin = np.cumsum(counts) - counts
        number = np.arange(self._slots)
        row_of_slot = begin[:, None] + np.where(number < counts[:, None], number, 0)
        slot_of_row = prompt_of_row * self._slots + np.arange(len(prompt_of_row)) - begin[prompt_of_row]
        self._full = bool((counts == self._slots).all())
        """Whether every slot has a row, in order."""
        self._row_of_slot = torch.from_numpy(row_of_slot.flatten()).to(self.device)
        self._slot_of_row = torch.from_numpy(slot_of_row).to(self.device)
        on_device = torch.from_numpy(prompt_of_row).to(self.device)
        self._row_padding = None if self._padding is None else self._padding[on_device]

    def _to_slots(self, x: Tensor, key_heads: int) -> Tensor:
        """[P·K, S·R, c] from [B·K, R, c]: all queries that share a prompt's key head side by side."""
        r, c = x.shape[1:]
        if not self._full:
            x = x.reshape(-1, key_heads, r, c).index_select(0, self._row_of_slot)
        slots = x.reshape(self._prompts, self._slots, key_heads, r, c).transpose(1, 2)
        return slots.reshape(self._prompts * key_heads, self._slots * r, c)

    def _to_rows(self, x: Tensor, key_heads: int) -> Tensor:
        """[B·K, R, c] from [P·K, S·R, c]."""
        r, c = x.shape[1] // self._slots, x.shape[2]
        rows = x.view(self._prompts, key_heads, self._slots, r, c).transpose(1, 2).reshape(-1, key_heads, r, c)
        if not self._full:
            rows = rows.index_select(0, self._slot_of_row)
        return rows.reshape(-1, r, c)


def _spacious(x: Tensor) -> Tensor:
    return with_slack(x, *x.shape).copy_(x)


def storable(x: Tensor) -> Tensor:
    """`x`, on a CPU in at least float32: a CPU has no half-precision product with a float32 result."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def scaled(q: Tensor, options: AttentionOptions) -> tuple[Tensor, float]:
    """Scaled queries, of which there are fewer than scores, and the factor that remains for the scores.

    In half precision the whole factor remains: it would be rounded into the queries.
    """
    factor = q.shape[-1] ** -0.5 if options.scaling is None else options.scaling
    return (q, factor) if q.dtype.itemsize < 4 else (q * factor, 1.0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product with an at-least-float32 result."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)
