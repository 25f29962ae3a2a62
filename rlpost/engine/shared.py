"""Weights in memory that two processes share: the one that trains writes versions, the one that samples reads them."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlpost.policy import adapters
from rlpost.policy.policy import Policy
from rlpost.policy.sharded import whole

ALIGNED = 64
"""Bytes at whose multiples tensors begin."""


@dataclass(frozen=True)
class Described:
    """A tensor, without its values."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch calls it: `float32`."""

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.kind.itemsize

    @property
    def kind(self) -> torch.dtype:
        """Its type."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def changing(policy: Policy) -> dict[str, Tensor]:
    """By name, the weights that a second load of the policy's start need not have: what trains, or was drawn."""
    if not policy.has_adapter:
        return {name: p.detach() for name, p in policy.trained().items()}
    own = adapters.parts(policy.model, adapters.POLICY)
    return {
        name: p.detach() for name, p in policy.named_parameters() if any(adapters.belongs(name, one) for one in own)
    }


def described(policy: Policy) -> list[Described]:
    """Its changing weights."""
    return [Described(n, tuple(x.shape), str(x.dtype).removeprefix("torch.")) for n, x in changing(policy).items()]


class SharedWeights:
    """Slots of memory, each of which holds one version of some weights."""

    def __init__(self, tensors: Sequence[Described], slots: int, descriptor: int | None = None) -> None:
        """Take the memory behind a file's descriptor, or new memory."""
        self._tensors = tensors
        self._size = max(1, sum(-(-t.bytes // ALIGNED) * ALIGNED for t in tensors))
        self.descriptor = _memory(slots * self._size) if descriptor is None else descriptor
        self._map = mmap.mmap(self.descriptor, slots * self._size)

    def write(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights into a slot; those in shards are gathered, so all ranks call this."""
        for name, there in self._slot(slot).items():
            there.copy_(whole(weights[name]))

    @torch.no_grad()
    def read(self, slot: int, weights: Mapping[str, Tensor]) -> None:
        """Copy a slot into the weights."""
        for name, there in self._slot(slot).items():
            weights[name].copy_(there)

    def close(self) -> None:
        """Close the descriptor; the memory is freed once no process has it."""
        os.close(self.descriptor)

    def _slot(self, slot: int) -> dict[str, Tensor]:
        at, found = slot * self._size, {}
        for t in self._tensors:
            flat = torch.frombuffer(self._map, dtype=t.kind, count=math.prod(t.shape), offset=at)
            found[t.name] = flat.view(t.shape)
            at += -(-t.bytes // ALIGNED) * ALIGNED
        return found


def _memory(size: int) -> int:
    """The descriptor of so many bytes of memory that has no name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rlpost-weights")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
