"""LoRA adapters on one base model: which one acts, without ever touching which one trains.

peft's `set_adapter` also makes the adapter it selects trainable and freezes the others, so selecting the
reference would train it. Here selection is the layers' active name alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlpost.errors import ModelError
from rlpost.recipe.schema import Lora

POLICY = "policy"
REFERENCE = "reference"
CRITIC = "critic"


def add_policy_adapter(model: nn.Module, lora: Lora) -> PeftModel:
    """Wrap `model` with a new trainable adapter named `policy`, an exact no-op until it is trained.

    Raises:
        ModelError: if no module of the model matches `target_modules`.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        # GPT-2 keeps its weights transposed; told so, peft does not have to guess (and warn).
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    try:
        return get_peft_model(model, config, adapter_name=POLICY)
    except ValueError as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"model.lora.target_modules={lora.target_modules}: {str(error).splitlines()[0]}; "
            f"this model has {', '.join(names)}"
        ) from error


def load_adapter(model: nn.Module, folder: Path, trainable: bool) -> PeftModel:
    """Wrap `model` with the adapter saved in `folder`, named `policy`."""
    try:
        return PeftModel.from_pretrained(model, folder, adapter_name=POLICY, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: this adapter does not fit its base model: {str(error).splitlines()[0]}") from error


def adapter_shape(folder: Path) -> tuple[int, float, Any]:
    """(r, alpha, target modules) of a saved adapter."""
    config = PeftConfig.from_pretrained(folder)
    targets = config.target_modules
    return config.r, float(config.lora_alpha), sorted(targets) if isinstance(targets, set | list) else targets


def add_adapter(model: PeftModel, name: str, state: dict[str, Tensor], *, trainable: bool = False) -> None:
    """A further adapter of the policy's shape with weights `state`."""
    if name not in model.peft_config:
        model.add_adapter(name, model.peft_config[POLICY])
    outcome = set_peft_model_state_dict(model, state, adapter_name=name)
    assert not outcome.unexpected_keys, outcome.unexpected_keys
    _settle(model, name, trainable)


def add_saved_adapter(model: PeftModel, name: str, folder: Path, *, trainable: bool = False) -> None:
    """A further adapter as it was saved in `folder`, of whatever shape.

    Raises:
        ModelError: it does not fit the model.
    """
    try:
        model.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: this adapter does not fit its base model: {str(error).splitlines()[0]}") from error
    _settle(model, name, trainable)


def _settle(model: PeftModel, name: str, trainable: bool) -> None:
    """The adapter trains or not, whatever peft made of it; the policy's goes on acting."""
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(trainable)
    select(model, POLICY)


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """A copy of one adapter's weights, names as in its file."""
    # Left to itself, peft asks the hub whether the vocabulary has grown; here it never does.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in state.items()}


def select(model: nn.Module, name: str | None) -> None:
    """Make adapter `name` act (None: the bare base) and leave every `requires_grad` as it is."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = name is None
            if name is not None:
                module._active_adapter = [name]


@contextmanager
def acting(model: nn.Module, name: str | None) -> Iterator[None]:
    """`name` acts inside, the policy's adapter again afterwards."""
    select(model, name)
    try:
        yield
    finally:
        select(model, POLICY)


def merged(model: PeftModel) -> nn.Module:
    """A new model with the policy's adapter merged into its weights; `model` and its base stay as they are."""

    with torch.no_grad():
        result: nn.Module = copy.deepcopy(model).merge_and_unload(adapter_names=[POLICY])
    return result


def save_adapter(model: PeftModel, folder: Path, name: str = POLICY) -> None:
    """Write one adapter alone into `folder`, as peft reads it.

    peft puts adapters of other names than "default" into a folder of their own; here each has a checkpoint to itself.
    """
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    inner = folder / name
    for file in inner.iterdir():
        file.rename(folder / file.name)
    inner.rmdir()
