"""Candidate tokens: the states after several next tokens of every row, none of which enters the cache.

A candidate attends to its row's cache and to itself. The token that a row then takes is given afterwards, and enters
the cache in the pass that reads the next candidates.

Axes: B rows, K candidates a row, H query heads, H' key heads, R = H/H', D head width or hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlpost.objectives.ragged import widen
from rlpost.policy.attention import AttentionOptions
from rlpost.policy.cache import PromptedLayer, PromptedLayout, product, scaled, storable
from rlpost.policy.decoders import FlatDecoder
from rlpost.policy.policy import Decoding, Policy

CANDIDATES_AT_ONCE = 16384
"""Candidates of one pass, over all rows."""
PAIRS_AT_ONCE = 1 << 22
"""(candidate, token it attends to) pairs of one pass; every head computes a score for each."""


class BranchedLayer(PromptedLayer):
    """One layer's keys and values, and during a pass those of the candidates."""

    layout: BranchedLayout
    branches: tuple[Tensor, Tensor] | None = None
    """[B, H', K, D]"""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values: those of joining tokens in the cache, the others for this pass only."""
        if self.layout.prefilling:
            return super().update(key_states, value_states)
        joining = self.layout.joining
        if joining:
            super().update(key_states[:, :, :1], value_states[:, :, :1])
        self.branches = storable(key_states[:, :, joining:]), storable(value_states[:, :, joining:])
        self.layout.current, self.latest = self, (key_states, value_states)
        return key_states, value_states


class BranchedLayout(PromptedLayout):
    """Attention of every row's newest token, if it has one, and of the candidates after it."""

    joining = 0
    """Tokens of each row that enter the cache in this pass, before its candidates: none or one."""

    def _attend(self, layer: PromptedLayer, query: Tensor, options: AttentionOptions) -> Tensor:
        assert isinstance(layer, BranchedLayer)
        branches = self._attend_branches(layer, query[:, :, self.joining :], options)
        if not self.joining:
            return branches
        return torch.cat([super()._attend(layer, query[:, :, :1], options), branches], 1)

    def _attend_branches(self, layer: BranchedLayer, query: Tensor, options: AttentionOptions) -> Tensor:
        """[B, K, H, D]; to prompts and rows, K candidates are K times as many query heads."""
        assert layer.branches is not None
        assert layer.prompt is not None
        rows, heads, candidates, width = query.shape
        key_heads = layer.branches[0].shape[1]
        by_head = (rows * key_heads, heads // key_heads, candidates)
        key, value = (x.flatten(0, 1)[:, None] for x in layer.branches)
        q, factor = scaled(query.to(key.dtype).reshape(rows * key_heads, -1, width), options)
        # As for a row's own token, one position further.
        first = 0 if options.window is None else max(0, self.width + self.length + 1 - options.window)
        prompt_columns, written = max(0, self.width - first), slice(max(0, first - self.width), self.length)
        # Three parts of the keys: the prompt, the row's own tokens, the candidate itself.
        scores = [widen(q.view(*by_head, width)).mul(widen(key)).sum(-1).flatten(1)[..., None]]
        if self.length > written.start:
            assert layer.own is not None
            own_key, own_value = (x.flatten(0, 1)[: rows * key_heads, written] for x in layer.own)
            scores.insert(0, product(q, own_key.transpose(1, 2)))
        if prompt_columns:
            prompt_key, prompt_value = (x[:, :, first:].flatten(0, 1) for x in layer.prompt)
            shared = product(self._to_slots(q, key_heads), prompt_key.transpose(1, 2))
            scores.insert(0, self._to_rows(shared, key_heads))
        weights = self._weights(torch.cat(scores, -1), prompt_columns, factor, options).to(value.dtype)
        end = prompt_columns + max(0, self.length - written.start)
        result = (weights[..., end].view(*by_head, 1) * value).flatten(1, 2)
        if end > prompt_columns:
            result = result + torch.bmm(weights[..., prompt_columns:end], own_value)
        if prompt_columns:
            shared = torch.bmm(self._to_slots(weights[..., :prompt_columns], key_heads), prompt_value)
            result = result + self._to_rows(shared, key_heads)
        return result.view(rows, heads, candidates, -1).transpose(1, 2).to(query.dtype)


class BranchDecoder(FlatDecoder):
    """Rows that continue prompts, and the hidden states after candidates for their next tokens."""

    LAYOUT, LAYER = BranchedLayout, BranchedLayer
    layout: BranchedLayout

    def __init__(self, trunk: Policy, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int], limit: int):
        """Prepare to decode at most `limit` tokens a row; arguments as of `FlatDecoder`.

        Args:
            trunk: a policy that decodes flat; gives the hidden states.
        """
        super().__init__(trunk.causal_lm.base_model, prompts, prompt_of_row, limit, blocks=trunk.blocks)
        self._waiting: Tensor | None = None
        """[B] taken tokens that are not in the cache yet."""
        self.start()

    def branch(self, candidate_BK: Tensor) -> Iterator[Tensor]:
        """The last hidden state after each candidate, in the model's precision, as pieces [B, some of K, D].

        Consume all pieces before the next call.
        """
        columns = self.layout.width + self.layout.length + 1
        at_once = min(CANDIDATES_AT_ONCE, PAIRS_AT_ONCE // columns)
        yield from map(self._branch, torch.split(candidate_BK.to(self.device), max(1, at_once // len(candidate_BK)), 1))

    def take(self, ids_B: Tensor) -> None:
        """The token that each row goes on with."""
        if self._waiting is not None:
            self._branch(ids_B[:, None])  # moves the waiting tokens into the cache; the candidates are ignored
        self._waiting = ids_B

    def keep(self, rows: Tensor) -> None:
        """Only these rows (ascending) go on."""
        super().keep(rows)
        if self._waiting is not None:
            self._waiting = self._waiting[rows]

    def _branch(self, candidate_BK: Tensor) -> Tensor:
        """[B, K, D] states after the candidates; waiting tokens enter the cache first."""
        joining = int(self._waiting is not None)
        position = self.position_B[:, None] + joining
        ids, positions = candidate_BK, position.expand_as(candidate_BK)
        if self._waiting is not None:
            ids = torch.cat([self._waiting[:, None], ids], 1)
            positions = torch.cat([self.position_B[:, None], positions], 1)
        self.layout.joining = joining
        self.layout.length += joining
        hidden = self._forward(ids, positions, self.layout, 0)
        self.position_B, self._waiting = position[:, 0], None
        return hidden[:, joining:]

    def _forward(self, ids: Tensor, position: Tensor, layout: Any, keep: int | Tensor) -> Tensor:
        """[rows, tokens, D] hidden states; `keep` as of logits."""
        hidden: Tensor = self.model(
            input_ids=ids, position_ids=position, past_key_values=self.cache, use_cache=True, layout=layout
        ).last_hidden_state
        return hidden if isinstance(keep, int) else hidden[:, keep]


def branches_well(trunk: Policy, longest: int, shortest: int) -> bool:
    """Whether `BranchDecoder` works for rows of `shortest` to `longest` tokens: flat, on one side of the switch."""
    one_way = trunk.switch is None or longest <= trunk.switch or shortest > trunk.switch
    return trunk.flat and trunk.decoding is Decoding.flat and one_way
