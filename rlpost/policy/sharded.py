"""Weights in shards (FSDP2): a rank keeps a part of each tensor, and a block's are gathered while it is used.

Whole weights exist for one block at a time, and those outside blocks (embedding, last norm, head) during a pass.
Adapters are not sharded: they are a hundredth of the weights, and every rank keeps all of them (docs/adr/0023).
All ranks make the same passes in the same order, since each pass gathers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rlpost import ranks
from rlpost.errors import ModelError, RlpostError
from rlpost.policy.quantized import is_quantized
from rlpost.types import Completion, Group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from rlpost.policy.policy import Policy

# It is about in-place operations on what a pass returned; there are none.
warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning)

ENTRIES = ("states", "next_logits", "run")
"""Besides its forward, the policy's methods that call into the model."""
SHORTEST = Group((0,), (Completion((), ()),))
"""What an empty pass reads: one token."""


@dataclass(frozen=True)
class Shards:
    """How a run's models are sharded."""

    mesh: DeviceMesh
    """All ranks, in one row."""
    device: torch.device
    offload: bool = False
    """Shards, their gradients and optimiser state are kept in the host's memory."""

    def apply(self, policy: Policy) -> None:
        """Shard a policy's model in place, if it is not yet; adapters that it has stay whole, as do later ones.

        Raises:
            ModelError: its blocks cannot be told, or its weights are in four bits.
        """
        if policy.sharding is not None:
            return
        model = policy.causal_lm
        if is_quantized(model):
            raise ModelError(
                f"{policy.base}: weights in four bits (model.quantization) cannot be kept in shards; use "
                "parallel.strategy=ddp"
            )
        adapters = {p for name, p in model.named_parameters() if _is_of_adapter(name)}
        for p in adapters:
            p.data = p.data.to(self.device)
        for block in blocks_of(model):
            self._shard(block, adapters, torch.bfloat16 if policy.in_bfloat16 else None)
        self._shard(policy, adapters, None)
        policy.sharding = Sharding(policy, self.device)

    def _shard(self, module: nn.Module, whole: set[nn.Parameter], half: torch.dtype | None) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        sharded = fully_shard(
            module,
            mesh=self.mesh,
            # Those outside blocks too: what stayed gathered would be out of date after the next update.
            reshard_after_forward=True,
            # Blocks are gathered in the precision of their products; gradients are summed in float32.
            mp_policy=MixedPrecisionPolicy(
                param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
            ),
            offload_policy=CPUOffloadPolicy() if self.offload else OffloadPolicy(),
            ignored_params=whole,
        )
        # Sums, not means: weights were counted over the whole update.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        # An expert may be without a token on one rank.
        sharded.set_reduce_scatter_unused_params(True)


class Sharding:
    """Of one policy: where its passes run, and that all ranks make as many."""

    def __init__(self, policy: Policy, device: torch.device) -> None:
        """Of a policy that was just sharded."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        self.device = device
        self._policy = policy
        self._in_turn = False
        for name in ENTRIES:
            register_fsdp_forward_method(policy, name)
            setattr(policy, name, MethodType(partial(_announced, self, getattr(policy, name)), policy))
        policy.register_forward_pre_hook(lambda *_: self.announce(), prepend=True)

    @contextmanager
    def in_turn(self, gradient: bool) -> Iterator[None]:
        """Inside, ranks may make different numbers of passes: who is done makes empty ones until all are.

        Args:
            gradient: each pass has its backward pass.
        """
        self._in_turn = True
        try:
            yield
        except BaseException as error:
            self._in_turn = False
            # Others would wait for what a pass that broke off did not send: they notice that this process ends.
            if isinstance(error, RlpostError) and not gradient:
                self._keep_company(gradient)
            raise
        self._in_turn = False
        self._keep_company(gradient)

    def _keep_company(self, gradient: bool) -> None:
        while ranks.anyone(False):
            self._empty_pass(gradient)

    def _empty_pass(self, gradient: bool) -> None:
        """A pass that changes nothing, but gathers and sums as any other."""
        with torch.set_grad_enabled(gradient):
            logits = self._policy.next_logits(self._policy.batch([SHORTEST]))
        if gradient:
            (logits.float().sum() * 0.0).backward()  # type: ignore[no-untyped-call]

    def announce(self) -> None:
        """Say that a pass is about to be made, where others may be done."""
        if self._in_turn:
            ranks.anyone(True)


def _announced(sharding: Sharding, inner: Callable[..., Any], _: Policy, *args: Any, **kwargs: Any) -> Any:
    sharding.announce()
    return inner(*args, **kwargs)


def blocks_of(model: Any) -> list[nn.Module]:
    """The repeated blocks of a transformers model, by the classes that it says are not to be split.

    Raises:
        ModelError: it names none.
    """
    names = set(model._no_split_modules or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        raise ModelError(f"{type(model).__name__} does not say what its blocks are: use parallel.strategy=ddp")
    return found


def _is_of_adapter(name: str) -> bool:
    return any(part.startswith(("lora_", "modules_to_save")) for part in name.split("."))


def is_sharded(x: Tensor) -> bool:
    """Whether this rank has a part of it only."""
    return isinstance(x, DTensor)


def apart(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that are whole and those in shards, which no operation takes together."""
    whole: list[Tensor] = []
    parts: list[Tensor] = []
    for x in tensors:
        (parts if is_sharded(x) else whole).append(x)
    return [some for some in (whole, parts) if some]


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor: all of it, unless it is sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every rank; they all call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, other: Tensor) -> Tensor:
    """A tensor that every rank has whole, sharded as another one is, unless it is already."""
    if isinstance(x, DTensor) or not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name, in the first rank's memory, a tensor at a time; all ranks call this."""
    gathered: dict[int, Tensor] = {}
    found = {}
    for name, x in model.state_dict(keep_vars=True).items():
        # Tied weights stay one tensor.
        if id(x) not in gathered:
            full = whole(x.detach())
            gathered[id(x)] = full.cpu() if ranks.is_first() else full.new_empty(0)
        found[name] = gathered[id(x)]
    return found
