"""What vLLM is given to sample from: whole weights by their checkpoint's names, or an adapter's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rlpost.errors import ModelError
from rlpost.policy.adapters import POLICY, saved_config
from rlpost.policy.merge import merged
from rlpost.policy.policy import Policy
from rlpost.policy.quantized import is_quantized
from rlpost.policy.saved import save_policy, whole_weights
from rlpost.policy.sharded import whole

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `max_lora_rank` may be."""
MERGE = "set {where}.merge_adapter=true, which hands over merged weights"


def must_be_servable(policy: Policy, merge_adapter: bool, where: str) -> None:
    """Check that vLLM can sample from what it is given of a policy.

    Args:
        policy: to sample from.
        merge_adapter: its adapter is merged into the weights that are handed over.
        where: the key path of the engine's section.

    Raises:
        ModelError: it cannot.
    """
    if not policy.has_adapter:
        return
    if merge_adapter:
        if policy.sharding is not None:
            raise ModelError(
                f"{where}.merge_adapter: weights in shards cannot be merged; leave it out, or use parallel.strategy=ddp"
            )
        return
    config = saved_config(policy.model, POLICY)
    problem = ""
    if config.use_dora:
        problem = "model.lora.use_dora: vLLM has no DoRA"
    elif config.modules_to_save:
        problem = f"model.lora.modules_to_save={config.modules_to_save}: vLLM's adapters have no whole modules"
    elif config.trainable_token_indices:
        problem = "trainable_token_indices: vLLM's adapters have no tokens of their own"
    elif is_quantized(policy.model):
        problem = "model.quantization: vLLM would sample from the weights before they were quantised"
    elif _rank(policy) > RANKS[-1]:
        problem = f"model.lora.r: vLLM's adapters have ranks up to {RANKS[-1]}, and this one has {_rank(policy)}"
    if problem:
        raise ModelError(f"{problem}; {MERGE.format(where=where)}")


def lora_rank(policy: Policy) -> int:
    """The least `max_lora_rank` that has room for the policy's adapter as it is saved."""
    return next(r for r in RANKS if r >= _rank(policy))


def _rank(policy: Policy) -> int:
    config = saved_config(policy.model, POLICY)
    return int(max([config.r, *(config.rank_pattern or {}).values()]))


def positions(policy: Policy) -> int:
    """Tokens of the longest row that vLLM reads as the policy does.

    Where longer rows are read with other rotary factors, vLLM would read short ones with them too.
    """
    return policy.max_positions if policy.switch is None else min(policy.max_positions, policy.switch)


def handed_over(policy: Policy, merge_adapter: bool) -> Any | None:
    """The transformers model whose weights are handed over whole; None where it is an adapter that is.

    A merged one is a copy.
    """
    if not policy.has_adapter:
        return policy.causal_lm
    return merged(policy.model) if merge_adapter else None


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by the names that its checkpoint has, tied ones once; shards are gathered one at a time.

    All ranks call this. Where transformers saves weights in another form than it computes with (experts), all of them
    are gathered at once.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own: dict[int, tuple[str, Tensor]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        own.setdefault(id(x), (name, x.detach()))
    if not _converts(model):
        yield from ((name, whole(x)) for name, x in own.values())
    else:
        yield from revert_weight_conversion(model, {name: whole(x) for name, x in own.values()}).items()


def _converts(model: Any) -> bool:
    """Whether transformers saves its weights in another form than it computes with."""
    from transformers.core_model_loading import revert_weight_conversion

    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        return bool(loaded)
    nothing: dict[str, Tensor] = {}
    return revert_weight_conversion(model, nothing) is not nothing


def write_weights(policy: Policy, folder: Path, merge_adapter: bool) -> None:
    """Write what is handed over as transformers or peft load it; only the first rank has all of a model in shards.

    All ranks call this where the weights are in shards.

    Raises:
        ModelError: the files do not hold the weights.
    """
    if policy.has_adapter and merge_adapter:
        save_policy(policy.around(merged(policy.model), bfloat16=False), folder)
    else:
        save_policy(policy, folder, weights=whole_weights(policy))
