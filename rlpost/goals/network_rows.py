"""Rows as a value network follows them from token to token, with a cache of its own beside the policy's.

The network may be an adapter on the policy's base, which acts for as long as the network is asked, or another model.

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
    """Rows as a value network follows them; see `guide.RowValues`."""

    def __init__(
        self,
        network: ValueHeadModel,
        log_value: Callable[[Tensor], Tensor],
        prompts: Sequence[Sequence[int]],
        prompt_of_row: Sequence[int],
        limit: int,
    ) -> None:
        """Read the prompts; `log_value` is of a logit."""
        self._network = network
        self._log_value = log_value
        self._rows = len(prompt_of_row)
        with self._acting():
            self._decoder = BranchDecoder(network.trunk, prompts, prompt_of_row, limit)

    def ahead(self, going: Tensor, candidate_GK: Tensor) -> Tensor:
        """[G, K] log of the value of the states that the candidates lead to, in float64."""
        going = going.cpu()
        candidate_BK = candidate_GK.new_zeros(self._rows, candidate_GK.shape[1]).index_copy(0, going, candidate_GK)
        with self._acting():
            logits = [self._head(hidden) for hidden in self._decoder.branch(candidate_BK)]
        return self._log_value(torch.cat(logits, 1))[going]

    def append(self, ids_B: Tensor) -> None:
        """The token that each row was given."""
        with self._acting():
            self._decoder.take(ids_B)

    def keep(self, rows: Tensor) -> None:
        """Only these rows (ascending) go on."""
        self._decoder.keep(rows)
        self._rows = len(rows)

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """The network's adapter acts, in the network's precision."""
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
    """The engine samples under autocast; heads are in float32 all the same, as in training."""
    return torch.autocast(device.type, enabled=False)
