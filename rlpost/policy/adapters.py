"""LoRA adapters on one base model: which one is active, independently of which one trains.

peft's `set_adapter` also makes the adapter it selects trainable and freezes the others, so selecting the
reference would train it. Here selection is the layers' active name alone. peft is imported where there are adapters.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlpost.errors import ModelError
from rlpost.policy import pissa
from rlpost.policy.adapter_files import WEIGHTS_FILE, SavedAdapter, first_line, read_adapter
from rlpost.policy.params import Lora

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

# peft reads it of every model that it wraps.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# Merging parts a head from an embedding that was tied to it where it has to (merge.py).
warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and a tied layer", UserWarning)

POLICY = "policy"
REFERENCE = "reference"
CRITIC = "critic"
TEACHER = "teacher"
ALL_LINEAR = "all-linear"


def add_policy_adapter(model: nn.Module, lora: Lora) -> PeftModel:
    """Wrap `model` with a new trainable adapter named `policy`, a no-op until it is trained.

    It is an exact one, but for rounding where it begins as the principal part of the weights (pissa.py).

    Raises:
        ModelError: if no module of the model matches `target_modules` or one of `modules_to_save`.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or ALL_LINEAR,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
        # GPT-2 stores its weights transposed; without this peft guesses, and warns.
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    odd = _odd_linear(model)
    if config.target_modules == ALL_LINEAR:
        config.exclude_modules = odd or None
    elif named := [n for n in odd if check_target_module_exists(config, n)]:
        raise ModelError(
            f"model.lora.target_modules={lora.target_modules}: {named[0]} gives more than its product, "
            "so a LoRA cannot be added to it; leave it out"
        )
    _must_be_whole(model, lora.modules_to_save or ())
    try:
        wrapped = get_peft_model(model, config, adapter_name=POLICY)
    except (ValueError, TypeError) as error:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"model.lora.target_modules={lora.target_modules}: {first_line(error)}; this model has {', '.join(names)}"
        ) from error
    _in_float32(wrapped, POLICY)
    if lora.init_lora_weights is not None:
        flags = trained_now(wrapped)
        initial = copy.deepcopy(wrapped.peft_config[POLICY])
        initial.lora_dropout, initial.modules_to_save = 0.0, None
        wrapped.add_adapter(pissa.INITIAL, initial)
        pissa.begin(wrapped, POLICY, lora.init_lora_weights)
        _settle(wrapped, pissa.INITIAL, False, flags)
    return wrapped


def _must_be_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Check that each of `modules_to_save` is there, and can be trained whole; peft ignores one that is not.

    Raises:
        ModelError: it is not there, or its weights are in four bits.
    """
    for wish in names:
        found = [m for n, m in model.named_modules() if n == wish or n.endswith(f".{wish}")]
        if not found:
            raise ModelError(
                f"model.lora.modules_to_save: this model has no {wish}; name modules such as lm_head and embed_tokens"
            )
        if any(not p.is_floating_point() for m in found for p in m.parameters()):
            raise ModelError(
                f"model.lora.modules_to_save: the weights of {wish} are in four bits (model.quantization), which "
                "cannot be trained; leave it out"
            )


def _in_float32(model: nn.Module, name: str) -> None:
    """Make an adapter's weights float32 on a base of any precision, as peft does for low ranks."""
    for parameter_name, p in model.named_parameters():
        if belongs(parameter_name, name) and p.dtype in (torch.float16, torch.bfloat16):
            p.data = p.data.float()


def _odd_linear(model: nn.Module) -> list[str]:
    """Linear layers that return more than their product: Llama 4's routers."""
    own = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m).forward != nn.Linear.forward
    ]
    with torch.no_grad():
        return [n for n, m in own if not isinstance(m(m.weight.new_zeros(1, m.in_features)), Tensor)]


def load_adapter(model: nn.Module, folder: Path, trainable: bool) -> PeftModel:
    """Wrap `model` with the adapter saved in `folder`, named `policy`.

    Raises:
        ModelError: it cannot be read, or does not fit the model.
    """
    from peft import PeftModelForCausalLM

    saved = read_adapter(folder)
    saved.config.inference_mode = not trainable
    with _fitting(folder):
        wrapped = PeftModelForCausalLM(model, saved.config, adapter_name=POLICY)
    _fill(wrapped, POLICY, saved.weights, folder)
    _settle(wrapped, POLICY, trainable, {})
    return wrapped


def are_in(model: Any) -> bool:
    """Whether peft has wrapped the model."""
    if "peft" not in sys.modules:  # it takes half a second to import, and whoever wraps a model has done so
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_lora(module: Any) -> bool:
    """Whether a layer has room for adapters' low ranks."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def adapted(model: PeftModel, name: str = POLICY) -> set[str]:
    """The modules that an adapter adds low ranks to, by their names in the base."""
    return {n for n, m in model.get_base_model().named_modules() if is_lora(m) and _has(m, name)}


def asked_for(model: PeftModel, targets: Any) -> set[str]:
    """The modules that `target_modules` means, by their names in the base."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
    from peft.utils.other import ModulesToSaveWrapper

    base = model.get_base_model()
    wrappers = {n: m for n, m in base.named_modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)}
    # A module that is trained whole gets no low ranks.
    whole = {n for n, m in wrappers.items() if isinstance(m, ModulesToSaveWrapper)}
    inside = tuple(f"{n}." for n in wrappers)
    own = {n: m for n, m in base.named_modules() if n not in whole and not n.startswith(inside)}
    if targets == ALL_LINEAR:
        head = base.get_output_embeddings()
        bare = {n: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for n, m in own.items()}
        odd = set(_odd_linear(base))
        return {n for n, m in bare.items() if isinstance(m, nn.Linear | Conv1D) and own[n] is not head and n not in odd}
    config = LoraConfig(target_modules=targets)
    return {n for n in own if n and check_target_module_exists(config, n)}


def set_dropout(model: PeftModel, rate: float) -> None:
    """Set the dropout rate of the policy's adapter, whatever it was saved with."""
    model.peft_config[POLICY].lora_dropout = rate
    for module in model.modules():
        if is_lora(module) and _has(module, POLICY):
            module.lora_dropout[POLICY] = nn.Dropout(rate) if rate > 0 else nn.Identity()


def _has(layer: BaseTunerLayer, name: str) -> bool:
    return name in layer._get_available_adapters()


def add_adapter(model: PeftModel, name: str, state: dict[str, Tensor], *, trainable: bool = False) -> None:
    """Add another adapter of the policy's shape, with weights `state`."""
    flags = trained_now(model)
    if name not in model.peft_config:
        model.add_adapter(name, saved_config(model, POLICY))
    _fill(model, name, state, name)
    _settle(model, name, trainable, flags)


def add_saved_adapter(model: PeftModel, name: str, folder: Path, *, trainable: bool = False) -> None:
    """Add the adapter saved in `folder`, of whatever shape.

    Raises:
        ModelError: it cannot be read, or does not fit the model.
    """
    saved: SavedAdapter = read_adapter(folder)
    flags = trained_now(model)
    with _fitting(folder):
        model.add_adapter(name, saved.config)
    _fill(model, name, saved.weights, folder)
    _settle(model, name, trainable, flags)


def belongs(parameter: str, name: str) -> bool:
    """Whether a parameter is adapter `name`'s, by its own name: `…q_proj.lora_A.policy.weight`."""
    return name in parameter.split(".")


def trained_now(model: nn.Module) -> dict[str, bool]:
    """`requires_grad` by parameter."""
    return {n: p.requires_grad for n, p in model.named_parameters()}


def _settle(model: PeftModel, name: str, trainable: bool, before: Mapping[str, bool]) -> None:
    """Set whether the adapter trains, restore the others' flags (peft changes them), and activate the policy's."""
    for parameter_name, parameter in model.named_parameters():
        if belongs(parameter_name, name):
            parameter.requires_grad_(trainable)
        elif parameter_name in before:
            parameter.requires_grad_(before[parameter_name])
    select(model, POLICY)


@contextmanager
def _fitting(location: Path | str) -> Iterator[None]:
    """Turn errors of peft inside into a ModelError: the adapter does not fit.

    Raises:
        ModelError: peft failed.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{location}: this adapter does not fit its base model: {first_line(error)}") from error


@torch.no_grad()
def _fill(model: PeftModel, name: str, weights: Mapping[str, Tensor], location: Path | str) -> None:
    """Load a file's weights into adapter `name`: all of them and no others.

    Raises:
        ModelError: the file lacks weights, has more, or has other weights of the base than the base itself.
    """
    from peft import set_peft_model_state_dict

    _in_float32(model, name)
    state = model.state_dict()
    # A file may hold weights of the base too: peft saves embeddings that an adapter targets.
    known = {key: x for key, x in weights.items() if key in state}
    for key, x in known.items():
        if x.shape != state[key].shape or not torch.equal(x.to(state[key]), state[key]):
            raise ModelError(
                f"{location}: it brings {key} of its own, other than that of its base model; "
                "merge it into that model with peft's merge_and_unload and name the merged folder"
            )
    with _fitting(location):
        outcome = set_peft_model_state_dict(
            model, {key: x for key, x in weights.items() if key not in known}, adapter_name=name
        )
    lacking = set(outcome.missing_keys)
    # Trained tokens of a tied head are those of the embedding, and are in the file once.
    filled = {x.data_ptr() for key, x in state.items() if belongs(key, name) and key not in lacking}
    missing = [key for key in outcome.missing_keys if belongs(key, name) and state[key].data_ptr() not in filled]
    for keys, what in (
        (missing, "lacks weights that its adapter_config.json asks for"),
        (outcome.unexpected_keys, "has weights that its adapter_config.json does not ask for"),
    ):
        if keys:
            raise ModelError(
                f"{location}: this adapter does not fit its base model: it {what}: {keys[0]} and {len(keys) - 1} more; "
                "take the file and the configuration from one training"
            )


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """A copy of one adapter's weights, names as in its file; they are of the shape that `saved_config` says."""
    from peft import get_peft_model_state_dict

    # By default peft asks the hub whether the vocabulary has grown; here it never has.
    states = [get_peft_model_state_dict(model, adapter_name=n, save_embedding_layers=False) for n in parts(model, name)]
    return {key: value.detach().clone() for key, value in reduce(pissa.joined, states).items()}


def saved_config(model: PeftModel, name: str) -> LoraConfig:
    """A copy of an adapter's configuration as it is saved."""
    config = copy.deepcopy(model.peft_config[name])
    if len(parts(model, name)) > 1:
        pissa.widen(config)
    return config


def wrapped_like(model: PeftModel, base: nn.Module) -> PeftModel:
    """Another base with a copy of the adapter that acts as the policy's in `model`."""
    from peft import PeftModelForCausalLM

    wrapped = PeftModelForCausalLM(base, saved_config(model, POLICY), adapter_name=POLICY)
    _fill(wrapped, POLICY, adapter_state(model, POLICY), POLICY)
    return wrapped


def parts(model: nn.Module, name: str) -> list[str]:
    """The names in peft of what acts as adapter `name`."""
    return [name, pissa.INITIAL] if name == POLICY and pissa.is_in(model) else [name]


def select(model: nn.Module, name: str | None) -> None:
    """Activate adapter `name` (None: the bare base) and leave every `requires_grad` as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._disable_adapters = name is None
            if name is not None:
                module._active_adapter = parts(model, name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            # A wrapper of a module or of tokens that an adapter has its own copy of. If `name` has none, the base's
            # own is active.
            module._disable_adapters = name is None
            if name is not None:
                module._active_adapter = [name] if name in module._adapters else []


@contextmanager
def acting(model: nn.Module, name: str | None) -> Iterator[None]:
    """Activate `name` inside, and the policy's adapter again afterwards."""
    select(model, name)
    try:
        yield
    finally:
        select(model, POLICY)


def save_adapter(model: PeftModel, folder: Path, name: str = POLICY, revision: str | None = None) -> None:
    """Write one adapter alone into `folder`, as peft reads it.

    `revision` is that of a base on the hub.
    """
    base = str(model.get_base_model().name_or_path)
    config = saved_config(model, name)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.revision, config.inference_mode = revision, True
    config.save_pretrained(folder)
    state = {key: x.cpu().contiguous() for key, x in adapter_state(model, name).items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
