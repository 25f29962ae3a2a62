"""Guided decoding: a policy's tokens are weighed by the values of the states they lead to.

With V(s) = P(a completion of s ends in the goal) the guided policy is π(v|s) ∝ π0(v|s)·w(s·v), where w is

- toward: V(s·v). With the true V this samples π0's completions given that they end in the goal (FUDGE, Yang & Klein
  2021, arXiv:2104.05218).
- away: S(s·v), the probability of not ending there, by a recursion or model of its own: where V is near 1, 1 − V is
  rounding error.
- soft: exp(V_soft(s·v)/β), the optimum of E[r] − β·KL (controlled decoding, Mudgal et al. 2023, arXiv:2310.17022).

At the end of a completion the goal itself decides instead of the value, also if the value is learned.

Axes: B rows, G of them that go on, K candidates a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlpost.errors import EngineError
from rlpost.goals.goal_set import Goal
from rlpost.types import Tokens


class Mode(StrEnum):
    """The direction of a guide."""

    toward = "toward"
    away = "away"
    soft = "soft"


@dataclass(frozen=True)
class Position:
    """A row's state: its tokens, and whether the next one is the last within its limit."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    last: bool


LogWeights = Callable[[Sequence[Position], Tensor], Tensor]
"""(rows, candidates [B, K]) -> [B, K] log V, log S or V_soft/β of the states that the candidates lead to."""


class RowValues(Protocol):
    """Values of rows that are followed token by token, with a cache."""

    def ahead(self, going: Tensor, candidate_GK: Tensor) -> Tensor:
        """[G, K] the `LogWeights` of rows `going` [G]."""
        ...

    def append(self, ids_B: Tensor) -> None:
        """Take note of the token that each row was given."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        ...


Follow = Callable[[Sequence[Sequence[int]], Sequence[int], int], RowValues | None]
"""(prompts, [B] the prompt of each row, most tokens of a row) -> their values; None if it cannot follow them."""


@dataclass(frozen=True)
class Guide:
    """Weighs the likeliest next tokens of every row by the values of the states they lead to."""

    ahead: LogWeights
    """Log-values of states that go on; for `away`, of not ending in the goal."""
    goal: Goal
    end_ids: Collection[int]
    mode: Mode = Mode.toward
    beta: float = 1.0
    """For `soft`: reaching the goal is worth 1/β nats."""
    candidates: int = 0
    """Number of likeliest tokens that are weighed, others are excluded; 0 for the whole vocabulary."""
    truncated_counts: bool = False
    """A truncated completion may reach the goal."""
    follow: Follow | None = None
    """The same values as `ahead`, faster: with a cache of each row."""

    def begin(self, prompts: Sequence[Tokens], prompt_of_row: Sequence[int], limits: Sequence[int]) -> GuidedRows:
        """Follow rows that are about to continue their prompts; see `engine.Guide`."""
        own = [tuple(np.asarray(prompt).tolist()) for prompt in prompts]
        values = self.follow(own, prompt_of_row, max(limits)) if self.follow is not None else None
        return GuidedRows(self, values, [own[p] for p in prompt_of_row], limits)

    def log_weights(self, logits_BV: Tensor, positions: Sequence[Position]) -> Tensor:
        """[B, V] what to add to log-probabilities before a token is drawn; −inf excludes a token.

        Raises:
            EngineError: `away`, and every candidate leads to a forbidden ending.
        """
        candidate_BK = self.likeliest(logits_BV)
        return self.spread(logits_BV, positions, candidate_BK, self.ahead(positions, candidate_BK))

    def likeliest(self, logits_BV: Tensor) -> Tensor:
        """[B, K] the tokens that are weighed, on the CPU."""
        rows, vocabulary = logits_BV.shape
        if not self.candidates or self.candidates >= vocabulary:
            return torch.arange(vocabulary).expand(rows, -1)
        return logits_BV.topk(self.candidates).indices.cpu()

    def spread(
        self, logits_BV: Tensor, positions: Sequence[Position], candidate_BK: Tensor, ahead_BK: Tensor
    ) -> Tensor:
        """[B, V] `log_weights`, given the log-values of the candidates if the completion goes on after them.

        Raises:
            EngineError: as there.
        """
        weight_BK = ahead_BK.clone()
        over_BK = torch.isin(candidate_BK, torch.tensor(sorted(self.end_ids)))
        over_BK |= torch.tensor([position.last for position in positions], dtype=torch.bool)[:, None]
        ending = zip(over_BK.nonzero()[:, 0].tolist(), candidate_BK[over_BK].tolist(), strict=True)
        weight_BK[over_BK] = weight_BK.new_tensor([self._over(positions[b], token) for b, token in ending])
        nowhere_B = (weight_BK == -math.inf).all(1)
        if nowhere_B.any():
            self._refuse(positions[int(nowhere_B.nonzero()[0])])
            # No candidate can reach the goal any more: the completion continues without guidance.
            weight_BK[nowhere_B] = 0.0
        # float64 weights stay float64, for the exact tests.
        full_BV = weight_BK.new_full(logits_BV.shape, -math.inf)
        return full_BV.scatter(1, candidate_BK, weight_BK).to(logits_BV.device)

    def reached(self, ids: Sequence[int], *, cut: bool) -> bool:
        """True if a completion of these tokens, without its end token, ends in the goal."""
        return (self.truncated_counts or not cut) and self.goal.reached(ids)

    def _over(self, position: Position, token: int) -> float:
        """The log-weight of a candidate after which the completion is over."""
        if token in self.end_ids:
            there = self.reached(position.ids, cut=False)
        else:
            there = self.reached((*position.ids, token), cut=True)
        if self.mode is Mode.soft:
            return float(there) / self.beta
        return 0.0 if there == (self.mode is Mode.toward) else -math.inf

    def _refuse(self, position: Position) -> None:
        if self.mode is Mode.away:
            which = f"of the {self.candidates} likeliest tokens" if self.candidates else "token"
            raise EngineError(
                f"after {len(position.ids)} tokens every one {which} leads to a forbidden ending; "
                "weigh more candidates, or forbid less"
            )


class GuidedRows:
    """The guided rows of one call."""

    def __init__(
        self, guide: Guide, values: RowValues | None, prompts: Sequence[tuple[int, ...]], limits: Sequence[int]
    ) -> None:
        """Start with no tokens; prompts and limits are by row. Without `values`, whole prefixes are evaluated."""
        self._guide = guide
        self._values = values
        self._prompts = list(prompts)
        self._limits = list(limits)
        self._ids: list[tuple[int, ...]] = [()] * len(self._prompts)

    def weigh(self, logits_BV: Tensor, going_B: Tensor) -> Tensor:
        """[B, V]; see `engine.Steering`."""
        going = going_B.nonzero()[:, 0]
        if not len(going):
            return logits_BV.new_zeros(logits_BV.shape)
        positions = [
            Position(self._prompts[b], self._ids[b], len(self._ids[b]) + 1 == self._limits[b]) for b in going.tolist()
        ]
        logits_GV = logits_BV[going]
        candidate_GK = self._guide.likeliest(logits_GV)
        if self._values is None:
            ahead_GK = self._guide.ahead(positions, candidate_GK)
        else:
            ahead_GK = self._values.ahead(going, candidate_GK)
        weight = self._guide.spread(logits_GV, positions, candidate_GK, ahead_GK)
        return weight.new_zeros(logits_BV.shape).index_copy(0, going, weight)

    def append(self, ids_B: Tensor) -> None:
        """Take note of the token that each row was given."""
        self._ids = [(*ids, new) for ids, new in zip(self._ids, ids_B.tolist(), strict=True)]
        if self._values is not None:
            self._values.append(ids_B)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        if self._values is not None:
            self._values.keep(rows)
        stay = rows.tolist()
        self._prompts, self._limits, self._ids = (
            [x[b] for b in stay] for x in (self._prompts, self._limits, self._ids)
        )
