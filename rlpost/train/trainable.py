"""What a learner asks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from rlpost.policy.batch import Batch
from rlpost.policy.logprobs import LogitStats
from rlpost.types import Group


class Trainable(Protocol):
    """What a learner trains: a policy, or a model with a value head (a critic, a reward model)."""

    @property
    def device(self) -> torch.device:
        """Where its weights live."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """A prompt is computed once for its completions."""
        ...

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        ...

    def layer_matrices(self) -> frozenset[str]:
        """Which of them are matrices of linear layers between embeddings and output head."""
        ...

    def batch(self, groups: Sequence[Group]) -> Batch:
        """The batch that its forward pass takes."""
        ...

    def __call__(self, batch: Batch, *stats: LogitStats) -> Any:
        """Its output on the batch; a policy also takes the statistics to compute."""
        ...

    def backward_done(self) -> None:
        """The backward pass of the last forward pass is over."""
        ...

    @property
    def in_shards(self) -> bool:
        """Every pass gathers weights from all ranks."""
        ...

    def in_turn(self, *, gradient: bool = False) -> AbstractContextManager[None]:
        """Inside, ranks may make different numbers of passes."""
        ...

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Dropout on, as while training, or off."""
        ...
