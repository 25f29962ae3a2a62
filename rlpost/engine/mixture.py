"""Sampling from a mixture of the policy and its reference: a guide that reads the reference beside the policy.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlpost.objectives.online import towards_reference
from rlpost.objectives.ragged import widen
from rlpost.policy.decoders import Decoder, decoding_attention, make_decoder
from rlpost.policy.reference import Reference
from rlpost.types import Tokens


class ReferenceMixture:
    """A guide to π^(1 − share)·π_ref^share, token by token; a share of 1 samples the reference itself."""

    def __init__(self, reference: Reference, share: float, temperature: float) -> None:
        """Mix the distributions that both have at a temperature, the one that is sampled at."""
        self._reference = reference
        self._share = share
        self._temperature = temperature

    def begin(self, prompts: Sequence[Tokens], prompt_of_row: Sequence[int], limits: Sequence[int]) -> _Rows:
        """Read the prompts; see `engine.Guide`."""
        return _Rows(self._reference, prompts, prompt_of_row, max(limits), self._share, self._temperature)


class _Rows:
    """The rows of one call, with the reference's cache."""

    def __init__(
        self,
        reference: Reference,
        prompts: Sequence[Tokens],
        prompt_of_row: Sequence[int],
        limit: int,
        share: float,
        temperature: float,
    ) -> None:
        self._reference = reference
        self._share = share
        self._temperature = temperature
        with self._reference.acting():
            self._decoder: Decoder = make_decoder(reference.policy, prompts, prompt_of_row, limit)
        self._logits_BV = self._read(None)

    def weigh(self, logits_BV: Tensor, going_B: Tensor) -> Tensor:
        """[B, V]; see `engine.Steering`."""
        weight_BV = towards_reference(logits_BV, self._logits_BV, share=self._share) / self._temperature
        return torch.where(going_B[:, None], weight_BV, 0.0)

    def append(self, ids_B: Tensor) -> None:
        """Read the token that each row was given."""
        self._logits_BV = self._read(ids_B)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        self._decoder.keep(rows)

    def _read(self, ids_B: Tensor | None) -> Tensor:
        """[B, V] the reference's logits of each row's next token."""
        policy, decoder = self._reference.policy, self._decoder
        with torch.no_grad(), policy.precision(), decoding_attention(policy), self._reference.acting():
            return widen(policy.known.cut(decoder.start() if ids_B is None else decoder.step(ids_B)))
