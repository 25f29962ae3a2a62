"""A value network's values of rows, token by token, with a cache of its own.

The network may be an adapter on the policy's base, which is active only while values are computed, or another model.

Axes: B rows, G of them that go on, K candidates a row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlpost.objectives.ragged import widen
from rlpost.policy import adapters
from rlpost.policy.branches import BranchDecoder
from rlpost.policy.value_head import ValueHeadModel


class NetworkRows:
    """A value network's `guide.RowValues`."""

    def __init__(
        self,
        network: ValueHeadModel,
        log_value: Callable[[Tensor], Tensor],
        prompts: Sequence[Sequence[int]],
        prompt_of_row: Sequence[int],
        limit: int,
    ) -> None:
        """Read the prompts; `log_value` maps a logit to a log-value."""
        self._network = network
        self._log_value = log_value
        self._rows = len(prompt_of_row)
        with self._active():
            self._decoder = BranchDecoder(network.trunk, prompts, prompt_of_row, limit)

    def ahead(self, going: Tensor, candidate_GK: Tensor) -> Tensor:
        """[G, K] log of the value of the states that the candidates lead to, in float64."""
        going = going.cpu()
        candidate_BK = candidate_GK.new_zeros(self._rows, candidate_GK.shape[1]).index_copy(0, going, candidate_GK)
        with self._active():
            logits = [self._head(hidden) for hidden in self._decoder.branch(candidate_BK)]
        return self._log_value(torch.cat(logits, 1))[going]

    def append(self, ids_B: Tensor) -> None:
        """Take note of the token that each row was given."""
        with self._active():
            self._decoder.take(ids_B)

    def keep(self, rows: Tensor) -> None:
        """Continue with these rows only (ascending)."""
        self._decoder.keep(rows)
        self._rows = len(rows)

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Activate the network's adapter and precision."""
        trunk = self._network.trunk
        adapter = adapters.acting(trunk.model, self._network.adapter) if trunk.has_adapter else nullcontext()
        with torch.no_grad(), trunk.precision(), adapter:
            yield

    def _head(self, hidden_BKD: Tensor) -> Tensor:
        """[B, K] logits."""
        with full_precision(hidden_BKD.device):
            logit: Tensor = self._network.head(widen(hidden_BKD))[..., 0]
        return logit


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Disable the engine's autocast: heads run in float32, as in training."""
    return torch.autocast(device.type, enabled=False)
