"""PiSSA: an adapter that begins as the principal part of its layers' weights, which is taken from them.

peft takes that part from the weights themselves. A reference on the same base would then be another model than the
base, and a saved adapter would need the changed weights. Here they stay as they are: a second adapter, `initial`, which
is never trained, takes the part away wherever the policy's adapter acts,

    W x + s·BA x − s·B₀A₀ x,

so the gradient is that of PiSSA. Both together are one ordinary adapter of twice the rank, [B, −B₀][A; A₀], and that is
what is saved (peft's own conversion of a PiSSA to a LoRA). `initial` is in every checkpoint: a decomposition made anew
could differ in its last bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlpost import ranks
from rlpost.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

INITIAL = "initial"
"""The adapter that takes away what the policy's began with."""


def doubled(r: int, alpha: float, *, use_rslora: bool) -> tuple[int, float]:
    """Rank and alpha of an adapter of twice the rank whose products have the same factor."""
    return 2 * r, alpha * (math.sqrt(2) if use_rslora else 2.0)


def is_in(model: nn.Module) -> bool:
    """Whether a model's policy adapter began in this way, and has not been saved since."""
    return INITIAL in getattr(model, "peft_config", {})


@torch.no_grad()
def begin(model: PeftModel, adapter: str, how: str) -> None:
    """Give `adapter` the principal part of its layers' weights, and `INITIAL`, which there is, the same with −B.

    All ranks take the first one's, since decompositions on two machines may differ in their last bits.

    Args:
        model: whose weights stay as they are.
        adapter: its name.
        how: `pissa`, or `pissa_niter_N`, as in peft.

    Raises:
        ModelError: it is on something else than linear layers, or on some with fewer singular vectors than its rank.
    """
    from peft.tuners.lora import Linear, LoraLayer

    begun: list[Tensor] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) is not Linear:
            raise ModelError(
                f"model.lora.init_lora_weights={how}: {name} is no linear layer with weights in 16 or 32 bits; leave "
                "it out of model.lora.target_modules, or init_lora_weights"
            )
        base, r = layer.get_base_layer(), layer.r[adapter]
        if r > min(base.weight.shape):
            raise ModelError(
                f"model.lora.r={r}: {name} is {tuple(base.weight.shape)} and has {min(base.weight.shape)} singular "
                f"vectors for model.lora.init_lora_weights={how}; lower r, or leave it out of model.lora.target_modules"
            )
        kept = base.weight.data
        layer.pissa_init(adapter, how)
        base.weight.data = kept  # peft puts another tensor there
        layer.lora_A[INITIAL].weight.copy_(layer.lora_A[adapter].weight)
        layer.lora_B[INITIAL].weight.copy_(-layer.lora_B[adapter].weight)
        begun += [side[which].weight.data for side in (layer.lora_A, layer.lora_B) for which in (adapter, INITIAL)]
    if not ranks.is_first():
        torch._foreach_zero_(begun)
    ranks.sum_over_ranks(begun)


def joined(state: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of one adapter that does what two do together; those that `initial` has not are as in `state`."""
    axis = {name: 0 if "lora_A" in name else 1 for name in initial}
    return {n: torch.cat([x, initial[n]], axis[n]) if n in initial else x for n, x in state.items()}


def widen(config: LoraConfig) -> None:
    """Make an adapter's configuration that of `joined` weights."""
    config.r, config.lora_alpha = doubled(config.r, config.lora_alpha, use_rslora=config.use_rslora)


class Initial:
    """The weights of `INITIAL`, for checkpoints."""

    def __init__(self, model: PeftModel) -> None:
        """Of a model that has it."""
        self._own = {n: p for n, p in model.named_parameters() if INITIAL in n.split(".")}

    def weights(self) -> dict[str, Tensor]:
        """By name."""
        return {name: p.detach() for name, p in self._own.items()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore them."""
        for name, p in self._own.items():
            p.copy_(weights[name])
