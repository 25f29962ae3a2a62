"""Which action belongs to which completion.

Axes: N action tokens, S completions, L the longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from rlpost.devices import moved


def widen(x: Tensor) -> Tensor:
    """`x` in at least float32: half precision and integers are cast up, float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


class Ragged:
    """S completions whose actions lie one after the other in tensors of length N.

    Example: ``Ragged([2, 0, 3])`` has N = 5; actions 0 and 1 belong to completion 0, none to
    completion 1, actions 2 to 4 to completion 2. A completion without actions has sum 0 and mean 0.
    """

    def __init__(self, lengths_S: Sequence[int] | Tensor) -> None:
        self.lengths_S = torch.as_tensor(lengths_S, dtype=torch.long)
        self._longest = int(self.lengths_S.max()) if len(self.lengths_S) else 0
        self._learned = int((self.lengths_S > 0).sum())
        self.index_N = torch.repeat_interleave(torch.arange(len(self.lengths_S)).to(self.device), self.lengths_S)
        """[N] the completion of each action."""
        self.start_S = torch.cumsum(self.lengths_S, 0) - self.lengths_S
        """[S] where each completion's actions begin."""

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.lengths_S.device

    @property
    def actions(self) -> int:
        """N."""
        return len(self.index_N)

    @property
    def completions(self) -> int:
        """S."""
        return len(self.lengths_S)

    @property
    def learned(self) -> int:
        """Completions with at least one action: the only ones that a mean over completions counts."""
        return self._learned

    @property
    def last(self) -> Tensor:
        """[S] index into N of each completion's last action, -1 where it has none."""
        return torch.where(self.lengths_S > 0, self.start_S + self.lengths_S - 1, -1)

    def to(self, device: torch.device | str) -> Ragged:
        """The same rows with their indices on `device`."""
        if torch.device(device) == self.device:
            return self
        other = copy(self)
        # Not made anew from the lengths: that many indices are not known there without waiting for the device.
        other.lengths_S, other.index_N, other.start_S = (
            moved(x, device) for x in (self.lengths_S, self.index_N, self.start_S)
        )
        return other

    def sum(self, x_N: Tensor) -> Tensor:
        """[S] sum over each completion's actions."""
        wide_N = widen(x_N)
        return wide_N.new_zeros(self.completions).index_add(0, self.index_N, wide_N)

    def mean(self, x_N: Tensor) -> Tensor:
        """[S] mean over each completion's actions, 0 where it has none."""
        return self.sum(x_N) / self.lengths_S.clamp(min=1)

    def spread(self, y_S: Tensor) -> Tensor:
        """[N] each completion's value at every one of its actions."""
        return y_S[self.index_N]

    def pad(self, x_N: Tensor, fill: float = 0.0) -> Tensor:
        """[S, L] one row a completion, `fill` after its last action."""
        out = x_N.new_full((self.completions, self._longest), fill)
        out[self.index_N, self._column_N()] = x_N
        return out

    def flatten(self, x_SL: Tensor) -> Tensor:
        """[N] the inverse of `pad`."""
        return x_SL[self.index_N, self._column_N()]

    def suffix_sum(self, x_N: Tensor) -> Tensor:
        """[N] the sum from each action to the end of its completion, itself included."""
        # A cumulative sum over all of N would mix the digits of different completions: one padded row each.
        return self.flatten(self.pad(widen(x_N)).flip(1).cumsum(1).flip(1))

    def _column_N(self) -> Tensor:
        return torch.arange(self.actions, device=self.device) - self.start_S[self.index_N]


def has_signal(reward_PG: Tensor) -> Tensor:
    """[P] bool: True where a group has two scored rewards that differ."""
    high = torch.where(reward_PG.isnan(), -torch.inf, reward_PG).amax(1)
    low = torch.where(reward_PG.isnan(), torch.inf, reward_PG).amin(1)
    return high > low
