"""Merges an adapter into the weights of its base, as a new model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlpost.policy.adapters import POLICY, parts, select, wrapped_like
from rlpost.policy.quantized import dequantize, is_quantized

if TYPE_CHECKING:
    from peft import PeftModel


def merged(model: PeftModel) -> nn.Module:
    """A new model with the policy's adapter merged into its weights; `model` and its base stay as they are.

    Weights in four bits are dequantised first: rounded to four bits again, they would lose most of the adapter.
    """
    from peft.utils.other import ModulesToSaveWrapper

    with torch.no_grad():
        own = _dequantized(model) if is_quantized(model) else copy.deepcopy(model)
        _untie(own.get_base_model())
        select(own, POLICY)
        for module in own.modules():
            if isinstance(module, ModulesToSaveWrapper) and module._active_adapter:
                # peft's merging looks the module up by this name, not by a list of one.
                module._active_adapter = POLICY
        result: nn.Module = own.merge_and_unload(adapter_names=parts(own, POLICY))
    return result


def _dequantized(model: PeftModel) -> PeftModel:
    """A copy with the policy's adapter alone, on weights in float32."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    own = copy.deepcopy(model)
    for module in own.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            module._active_adapter = []  # what is unloaded is the base's own
    base: nn.Module = own.unload()
    dequantize(base)
    return wrapped_like(model, base)


def _untie(model: Any) -> None:
    """Untie the head from the embedding if the adapter changes them differently."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inner, outer = _bare(embedding), _bare(head)
    if inner is outer or inner.weight is not outer.weight or not (_changed(embedding) or _changed(head)):
        return
    if getattr(getattr(head, "token_adapter", None), "tied_adapter", None) is not None:
        return  # peft changes both alike
    outer.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=inner.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _bare(module: Any) -> Any:
    """The layer without adapters around it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return _bare(module.original_module)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _changed(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        return POLICY in module._adapters
    return isinstance(module, BaseTunerLayer) and POLICY in module._get_available_adapters()
