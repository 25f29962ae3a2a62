"""From a folder, a checkpoint or a hub name to a policy that has been checked."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpost import console
from rlpost.data.codec import make_codec
from rlpost.errors import ModelError
from rlpost.policy import adapters
from rlpost.policy.check import Exactness, check_exactness, use_attention
from rlpost.policy.policy import Policy
from rlpost.recipe.schema import Attention, Direction, Lora, Model, Precision
from rlpost.run.names import ABOUT

ADAPTER_FILE = "adapter_config.json"
HEAD_FILE = "scalar_head.safetensors"
"""Beside the weights or the adapter of a model of scalars: the head's weight [1, D] and bias [1]."""


def load_policy(
    path: str | Path,
    settings: Model,
    *,
    bfloat16: bool = False,
    device: torch.device | str = "cpu",
    trainable: bool = True,
    scores: bool = False,
    backwards: bool = False,
) -> Policy:
    """Load, check, and dress a model as the recipe says.

    Args:
        path: a model folder, a checkpoint of rlpost (full or adapter), or a hub name.
        settings: the recipe's `model` section.
        bfloat16: the precision already decided (see `decide_bfloat16`).
        device: where to put it.
        trainable: False freezes every weight.
        scores: it is to be the trunk of a model of scalars, which is no policy.
        backwards: it is to be a model of reversed text, which is no policy either.

    Raises:
        ModelError: if it cannot be loaded, is something else, or adapter, tokenizer and model do not fit together.
    """
    folder = Path(path)
    _must_be(folder, scores, backwards)
    adapter = folder if (folder / ADAPTER_FILE).is_file() else None
    base = base_of(adapter) if adapter else str(path)
    wants_lora = settings.lora is not None
    # A base under adapters needs no float32 weights; weights that train do, and so does a frozen copy of them, which
    # must score what they scored.
    half = bfloat16 and (wants_lora or (adapter is not None and not trainable))
    model = _model(base, settings, torch.bfloat16 if half else torch.float32).to(device)
    tokenizer = load_tokenizer(str(path), settings, base)
    _fit(model, tokenizer, str(path))
    remove_dropout(model)
    exact = check_exactness(model, tokenizer)
    flat = choose_rows(exact, settings.attention, type(model).__name__)
    if not flat:
        use_attention(model, "sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    dressed = _dress(model, adapter, settings.lora, trainable)
    policy = Policy(dressed, tokenizer, flat=flat, bfloat16=bfloat16, tiled=exact.tiled, base=base)
    # A chat template may end turns with another token than the tokenizer's end token (ChatML's <|im_end|>).
    codec = make_codec(tokenizer)
    # Read backwards, a turn has its stop token first: only the end token ends the text.
    policy.end_ids = (codec.end,) if backwards else tuple(dict.fromkeys((*policy.end_ids, *codec.stops)))
    if settings.gradient_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy.causal_lm.enable_input_require_grads()
    if not trainable:
        policy.requires_grad_(False)
    return policy.eval()


def is_backwards(folder: str | Path) -> bool:
    """Whether a checkpoint is a model of reversed text, as `data.NAME.direction: reverse` makes one."""
    about = Path(folder) / ABOUT
    return about.is_file() and json.loads(about.read_text("utf-8")).get("direction") == Direction.reverse


def _must_be(folder: Path, scores: bool, backwards: bool) -> None:
    if not scores and (folder / HEAD_FILE).is_file():
        raise ModelError(
            f"{folder}: a model that scores ({HEAD_FILE}), not a policy; name the stage it was trained from"
        )
    if backwards and not is_backwards(folder):
        raise ModelError(f"{folder}: it reads forwards; name an sft stage with direction: reverse, or its checkpoint")
    if is_backwards(folder) and not backwards:
        raise ModelError(f"{folder}: it reads backwards (direction: reverse), so it is no policy; name another stage")


def choose_rows(exact: Exactness, wish: Attention, family: str) -> bool:
    """True for flat rows; says so when a model has to do without them.

    Raises:
        ModelError: if the recipe insists on flat rows and they are not exact.
    """
    if wish is Attention.padded:
        return False
    if exact.flat:
        return True
    if wish is Attention.flat:
        raise ModelError(f"model.attention=flat: not exact for {family}: {exact.reason}; use model.attention=auto")
    console.warn(f"{family} runs on padded rows, without shared prompts: {exact.reason}")
    return False


def base_of(adapter: Path) -> str:
    """The base model that an adapter folder names.

    Raises:
        ModelError: if it names none.
    """
    checkpoint = adapter / "checkpoint.json"
    named = json.loads(checkpoint.read_text("utf-8")).get("base") if checkpoint.is_file() else None
    named = named or json.loads((adapter / ADAPTER_FILE).read_text("utf-8")).get("base_model_name_or_path")
    if not named:
        raise ModelError(
            f"{adapter}: an adapter that names no base model; add base_model_name_or_path to {ADAPTER_FILE}"
        )
    return str(named)


def decide_bfloat16(wish: Precision, device: torch.device | str) -> bool:
    """True for bfloat16: under `auto` on a GPU made for it; on a CPU if matrix products are 1.5 times as fast in it."""
    if wish is not Precision.auto:
        return wish is Precision.bfloat16
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _product_seconds(torch.float32) > 1.5 * _product_seconds(torch.bfloat16)


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout to zero: the log-probabilities of sampling and training must be those of one model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Some families keep rates as plain numbers: attention_dropout, OPT's dropout and layerdrop.
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def _product_seconds(dtype: torch.dtype) -> float:
    a = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best


def _model(base: str, settings: Model, dtype: torch.dtype) -> Any:
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            base,
            revision=settings.revision,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(_load_failure(base, error)) from error
    if missing := sorted(found["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ModelError(f"{base}: {len(missing)} of the model's weights are missing, {missing[0]} for one")
    return model


def _load_failure(base: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(base).is_dir():
        return f"{base}: the model in this folder cannot be loaded: {reason}"
    if base.startswith((".", "/", "~")):
        return f"{base}: no such folder; give a model folder, a checkpoint or a hub name"
    return f"{base}: neither a local folder nor reachable on the hub ({reason}); check the name, or the connection"


def load_tokenizer(path: str, settings: Model, base: str | None = None) -> Any:
    """The tokenizer in `path`, or else that of `base` (`path` itself by default), with the recipe's chat template.

    Raises:
        ModelError: there is none, or the template's file is missing.
    """
    base = base or path
    own = Path(path) / "tokenizer_config.json"
    source = path if own.is_file() or not Path(path).is_dir() else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=settings.revision if source == base else None,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: no tokenizer can be loaded: {str(error).splitlines()[0]}") from error
    return with_chat_template(tokenizer, settings)


def with_chat_template(tokenizer: Any, settings: Model) -> Any:
    """The tokenizer with the recipe's chat template, if it has one.

    Raises:
        ModelError: the template's file is missing.
    """
    if settings.chat_template is not None:
        file = Path(settings.chat_template)
        if not file.is_file():
            raise ModelError(f"model.chat_template: no such file: {file}")
        tokenizer.chat_template = file.read_text("utf-8")
    return tokenizer


def _fit(model: Any, tokenizer: Any, path: str) -> None:
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: its tokenizer has no end token, so a completion could never end; set eos_token")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{path}: the tokenizer knows {len(tokenizer)} tokens but the model embeds {rows}; "
            "use the tokenizer the model was trained with"
        )


def _dress(model: Any, adapter: Path | None, lora: Lora | None, trainable: bool) -> Any:
    """Put adapters on as needed: a saved one, a new one, or a saved one merged for full fine-tuning."""
    if adapter is None:
        return model if lora is None or not trainable else adapters.add_policy_adapter(model, lora)
    loaded = adapters.load_adapter(model, adapter, trainable)
    if lora is None and trainable:
        console.say(f"{adapter}: its adapter is merged, since the recipe trains all weights (model.lora is not set)")
        return adapters.merged(loaded).requires_grad_(True)
    if lora is not None and trainable:
        r, alpha, _ = adapters.adapter_shape(adapter)
        if (r, alpha) != (lora.r, lora.alpha):
            raise ModelError(
                f"{adapter}: its adapter has r={r}, alpha={alpha:g} but model.lora says r={lora.r}, "
                f"alpha={lora.alpha:g}; set `model.lora.r={r} model.lora.alpha={alpha:g}` to go on training it"
            )
    return loaded
