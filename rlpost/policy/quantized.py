"""Weights in four bits under an adapter: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

The weights of linear layers are quantised once, on the CPU, from the precision they are stored in, so that they are the
same on every device and under every `model.precision`; the embedding, norms and the head stay as they are. Products
dequantise a layer at a time. An adapter's folder says that its base was in four bits (`FILE`), since on other weights
it would say something else.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlpost import console
from rlpost.errors import ModelError
from rlpost.policy.adapter_files import read_json_object
from rlpost.policy.model_files import load_model, stored_dtype
from rlpost.policy.params import Quantization

FILE = "quantization_config.json"
"""In an adapter's folder: the keyword arguments of transformers' BitsAndBytesConfig for its base."""
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
"""What `FILE` holds."""


def load_base(base: str, revision: str | None, dtype: torch.dtype, quantization: Quantization | None) -> Any:
    """A causal language model, with linear layers in four bits if that is asked for, and the rest in `dtype`.

    Raises:
        ModelError: it cannot be loaded, or cannot be quantised, or bitsandbytes is not installed.
    """
    if quantization is None:
        return load_model(base, revision, dtype)
    must_have_bitsandbytes(quantization)
    model = load_model(base, revision, stored_dtype(base, revision))
    stored = _mib(model)
    _quantize(model, base, dtype)
    model.to(dtype)
    console.say(f"{base}: its weights take {_mib(model):.1f} MiB in {quantization}, and {stored:.1f} MiB as stored")
    return model


def must_have_bitsandbytes(quantization: Quantization) -> None:
    """Raise ModelError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.quantization={quantization}: needs the package bitsandbytes: pip install 'rlpost[bnb]'"
        )


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has weights in four bits."""
    return any(_in_four_bits(m) for m in model.modules())


def dequantize(model: Any) -> None:
    """Replace layers in four bits by linear layers with the same weights in float32."""
    from bitsandbytes.functional import dequantize_4bit

    for parent, name, layer in _layers(model):
        if _in_four_bits(layer):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            setattr(parent, name, _linear(weight, layer.bias))
    model.is_loaded_in_4bit = False


def record(model: nn.Module, folder: Path) -> None:
    """Write into an adapter's folder that its base is in four bits, if it is."""
    if is_quantized(model):
        (folder / FILE).write_text(json.dumps(NF4, indent=2) + "\n", "utf-8")


def recorded(folder: Path) -> Quantization | None:
    """What an adapter's folder says of its base.

    Raises:
        ModelError: it is of another kind than is known here.
    """
    if not (folder / FILE).is_file():
        return None
    if read_json_object(folder / FILE) != NF4:
        raise ModelError(f"{folder / FILE}: its base is quantised in a way that is not supported; restore the file")
    return Quantization.nf4


def _quantize(model: Any, base: str, dtype: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    found = [(parent, name) for parent, name, m in _layers(model) if type(m) is nn.Linear and m is not head]
    if not found:
        raise ModelError(
            f"model.quantization: {type(model).__name__} in {base} has no linear layers to quantise; leave it out"
        )
    for parent, name in found:
        layer = getattr(parent, name)
        with torch.device("meta"):
            four = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype, quant_type="nf4")
        # It is quantised when it is put on a device.
        four.weight = Params4bit(layer.weight.data.float(), quant_type="nf4", module=four).to("cpu")
        four.bias = layer.bias
        # On some CPUs it would multiply in bfloat16 without gradient and in float32 with: other log-probabilities.
        four.support_avx512bf16_for_cpu = False
        setattr(parent, name, four)
    model.is_loaded_in_4bit = True  # peft asks for it


def _layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    return [(parent, name, child) for parent in list(model.modules()) for name, child in parent.named_children()]


def _linear(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def _in_four_bits(module: nn.Module) -> bool:
    if "bitsandbytes" not in sys.modules:
        return False
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)


def _mib(model: nn.Module) -> float:
    """Of all weights; those in four bits with the scales of their blocks."""
    found = 0
    for p in model.parameters():
        found += p.numel() * p.element_size()
        if (state := getattr(p, "quant_state", None)) is not None:
            scales = [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
            found += sum(x.numel() * x.element_size() for x in scales)
    return found / 2**20
