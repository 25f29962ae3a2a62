"""Loads a policy from a folder, a checkpoint or a hub name, and checks it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from rlpost import console
from rlpost.data.codec import make_codec
from rlpost.data.params import Direction
from rlpost.errors import ModelError
from rlpost.kernels.build import SWITCH, why_none
from rlpost.policy import adapters, pissa
from rlpost.policy.adapter_files import base_of, base_revision, is_adapter, read_adapter_config, read_json_object
from rlpost.policy.check import Exactness, check_exactness, probe_groups
from rlpost.policy.fast_layers import use_fast_linear
from rlpost.policy.kernel_check import exact_kernels
from rlpost.policy.memory import give_back_freed_memory
from rlpost.policy.merge import merged
from rlpost.policy.model_files import (
    as_model_error,
    load_generation_config,
    load_tokenizer,
    must_fit,
)
from rlpost.policy.params import Attention, Lora, Model, Precision, Quantization
from rlpost.policy.policy import Decoding, Policy
from rlpost.policy.quantized import load_base, recorded
from rlpost.policy.saved import name_ends
from rlpost.policy.score import logprobs
from rlpost.policy.trunk_check import why_no_trunk
from rlpost.run.names import ABOUT

MERGED_GAP = 1e-2
"""Largest change of a log-probability, in nats, when an adapter is merged; more is not rounding."""
BEYOND_RECIPES = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices"),
)
"""Options of a saved adapter that go on as they were saved, where `model.lora` leaves them out or has none such."""
WIDE = 1024
"""Hidden width of a model that is not known."""
WIDE_ENOUGH = 256
"""Hidden width from which on bfloat16 is chosen on a CPU: products are little of a narrower model's time."""
HEAD_FILE = "scalar_head.safetensors"
"""File of a value head, next to the weights or the adapter of its trunk: weight [1, D] and bias [1]."""


def load_policy(
    path: str | Path,
    settings: Model,
    *,
    bfloat16: bool = False,
    device: torch.device | str = "cpu",
    trainable: bool = True,
    value_head: bool = False,
    backwards: bool = False,
) -> Policy:
    """Load a model, check it, and add adapters as the recipe says.

    Args:
        path: a model folder, a checkpoint of rlpost (full or adapter), or a hub name.
        settings: the recipe's `model` section.
        bfloat16: the precision already decided (see `decide_bfloat16`).
        device: where to put it.
        trainable: False freezes every weight.
        value_head: it has a value head, so it is not a policy.
        backwards: it is a model of reversed text, so it is not a policy either.

    Raises:
        ModelError: if it cannot be loaded, is something else, or adapter, tokenizer and model do not fit together.
    """
    folder = Path(path)
    must_be_policy(folder, value_head, backwards)
    adapter = folder if is_adapter(folder) else None
    base = base_of(adapter) if adapter else str(path)
    if adapter is not None:
        read_adapter_config(adapter)  # before the base, which takes longer
        settings = settings.model_copy(update={"revision": settings.revision or base_revision(adapter)})
    # Trained weights are float32, and so is a frozen copy of them, whose scores must be the same. A base under adapters
    # may be in half precision.
    half = bfloat16 and (settings.lora is not None or (adapter is not None and not trainable))
    dtype = torch.bfloat16 if half else torch.float32
    model = load_base(base, settings.revision, dtype, _quantization(adapter, settings, trainable)).to(device)
    if adapter is not None:
        load_generation_config(adapter, model)
    tokenizer = load_tokenizer(str(path), settings, base)
    must_fit(model, tokenizer, str(path))
    remove_dropout(model)
    if settings.fast:
        use_fast_linear(model)
    with as_model_error(f"{base}: the model cannot be run as its config.json says"):
        exact = check_exactness(model, tokenizer, settings.attention)
    flat = choose_rows(exact, settings.attention, type(model).__name__, base)
    revision = None if Path(base).is_dir() else settings.revision
    policy = Policy(model, tokenizer, flat=flat, bfloat16=bfloat16, base=base, revision=revision, **exact.ways())
    policy.model = _with_adapters(policy, adapter, settings.lora, trainable)
    _choose_layers(policy, settings.fast)
    _choose_ends(policy, backwards)
    if settings.gradient_checkpointing:
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy.causal_lm.enable_input_require_grads()
    if not trainable:
        policy.requires_grad_(False)
    with as_model_error(f"{path}: the model cannot be run"):
        _must_be_finite(policy.eval(), path)
    give_back_freed_memory()
    return policy


def _quantization(adapter: Path | None, settings: Model, trainable: bool) -> Quantization | None:
    """The number format of the base: for a new adapter the recipe's, for a saved one that it was trained on.

    Models that are frozen and have no adapter are never quantised: they would say something else.

    Raises:
        ModelError: a saved adapter is to go on in another one.
    """
    found = None if adapter is None else recorded(adapter)
    asked = settings.quantization
    if settings.lora is None or not trainable or found is asked:
        return found
    if adapter is None or (found is None and not (adapter / ABOUT).is_file()):  # one from elsewhere does not say
        return asked
    raise ModelError(
        f"{adapter}: its adapter was trained on weights in {found or 'full precision'}; "
        f"set model.quantization={found or 'null'} to go on training it, or merge it and start from the merged folder"
    )


def _choose_ends(policy: Policy, backwards: bool) -> None:
    """Which tokens end its completions."""
    # A chat template may end turns with another token than the tokenizer's end token (ChatML's <|im_end|>).
    codec = make_codec(policy.tokenizer)
    # In reversed text a turn begins with its stop token: only the end token ends the text.
    policy.end_ids = (codec.end,) if backwards else tuple(dict.fromkeys((*policy.end_ids, *codec.stops)))
    name_ends(policy)


def _choose_layers(policy: Policy, fast: bool) -> None:
    """Which layers read its rows, once it has its adapters."""
    policy.blocks = fast
    if fast:
        policy.trunk = not why_no_trunk(policy, probe_groups(policy.vocabulary, policy.max_positions))
        policy.kernels, reason = exact_kernels(policy, probe_groups(policy.vocabulary, policy.max_positions))
        if reason:
            _tell_once(f"attention runs on padded tiles, which is slower: {reason}")
        if policy.trunk and SWITCH not in os.environ and (reason := why_none()):
            _tell_once(
                f"layers are not compiled, so training and sampling on the CPU take about twice as long: {reason}"
            )


@cache
def _tell_once(notice: str) -> None:
    console.notice(notice)


def is_backwards(folder: str | Path) -> bool:
    """Whether a checkpoint is a model of reversed text, as `data.NAME.direction: reverse` makes one."""
    about = Path(folder) / ABOUT
    return about.is_file() and read_json_object(about).get("direction") == Direction.reverse


def must_be_policy(folder: Path, value_head: bool = False, backwards: bool = False) -> None:
    """Check that a folder holds a policy, or else what is asked for.

    Raises:
        ModelError: it is a model that scores or reads backwards, or one that does not where it should.
    """
    if not value_head and (folder / HEAD_FILE).is_file():
        raise ModelError(
            f"{folder}: a model that scores ({HEAD_FILE}), not a policy; name the stage it was trained from"
        )
    if backwards and not is_backwards(folder):
        raise ModelError(f"{folder}: it reads forwards; name an sft stage with direction: reverse, or its checkpoint")
    if is_backwards(folder) and not backwards:
        raise ModelError(
            f"{folder}: it reads backwards (direction: reverse), so it is not a policy; name another stage"
        )


def _must_be_finite(policy: Policy, path: str | Path) -> None:
    logp_N = logprobs(policy, probe_groups(policy.vocabulary, policy.max_positions))
    if not bool(torch.isfinite(logp_N).all()):
        raise ModelError(
            f"{path}: the model's log-probabilities are not finite; its weights or config.json are damaged"
        )


def choose_rows(exact: Exactness, wish: Attention, family: str, path: str = "model") -> bool:
    """True for flat rows; warns when a model can only be scored or sampled in a slower way.

    Raises:
        ModelError: if it cannot be trained, or if the recipe insists on flat rows and they are not exact.
    """
    if exact.refused:
        raise ModelError(
            f"{path}: {family} cannot be trained here: {exact.refused}; "
            "use a causal language model (for BERT and its like, is_decoder: true in the configuration makes one)"
        )
    if wish is Attention.flat and not exact.flat:
        raise ModelError(f"model.attention=flat: not exact for {family}: {exact.reason}; use model.attention=auto")
    if exact.single:
        console.warn(f"{family} scores each row in a pass of its own, which is slow: padding changes its logits")
    elif not exact.flat and wish is not Attention.padded:
        console.warn(f"{family} runs on padded rows, without shared prompts: {exact.reason}")
    if exact.decoding is Decoding.recomputed:
        console.warn(f"{family} samples without a cache, which is slow: {exact.decoding_reason}")
    elif exact.flat and exact.decoding is Decoding.padded:
        console.warn(f"{family} samples on padded rows, without shared prompts: {exact.decoding_reason}")
    elif exact.extends_reason and wish is not Attention.padded:
        console.warn(f"{family} reads every turn of an episode from its beginning: {exact.extends_reason}")
    if exact.reach is not None:
        console.warn(f"{family} is used up to {exact.reach} tokens: beyond, a row's length changes how it is read")
    return exact.flat and wish is not Attention.padded


def decide_bfloat16(wish: Precision, device: torch.device | str, width: int = WIDE) -> bool:
    """True for bfloat16: under `auto` on a GPU made for it; on a CPU made for it with compiled layers, in wider models.

    Args:
        wish: the recipe's `model.precision`.
        device: where the model runs.
        width: the model's hidden width.
    """
    if wish is not Precision.auto:
        return wish is Precision.bfloat16
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Layers that are not compiled cast before and after every product, and lose what it gains. It is not measured: two
    # runs on one machine are to be the same.
    made_for_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return width >= WIDE_ENOUGH and made_for_it and not why_none()


def width_of(model: str | Path, revision: str | None = None) -> int:
    """The hidden width of a model, or of an adapter's base.

    Raises:
        ModelError: its configuration cannot be read.
    """
    base = model
    if is_adapter(Path(model)):
        base, revision = base_of(Path(model)), revision or base_revision(Path(model))
    with as_model_error(f"{base}: the model's config.json cannot be read"):
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    return int(getattr(config.get_text_config(), "hidden_size", WIDE))


def remove_dropout(model: nn.Module) -> None:
    """Set every dropout to zero: sampling and training must compute the same log-probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Some families keep rates as plain numbers: attention_dropout, OPT's dropout and layerdrop.
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def _with_adapters(bare: Policy, adapter: Path | None, lora: Lora | None, trainable: bool) -> Any:
    """The model with the adapter that is needed: a saved one, a new one, or a saved one merged for full fine-tuning."""
    model = bare.model
    if adapter is None:
        if lora is None or not trainable:
            return model
        wrapped = adapters.add_policy_adapter(model, lora)
        with as_model_error(f"model.lora.target_modules={lora.target_modules}: {type(model).__name__} fails with it"):
            logprobs(bare.around(wrapped, bfloat16=bare.in_bfloat16), probe_groups(bare.vocabulary, bare.max_positions))
        return wrapped
    loaded = adapters.load_adapter(model, adapter, trainable)
    if lora is None and trainable:
        console.say(f"{adapter}: its adapter is merged, since the recipe trains all weights (model.lora is not set)")
        return proven_merge(bare, loaded, adapter).requires_grad_(True)
    if lora is not None and trainable:
        _must_be_shaped(loaded, adapter, lora)
    return loaded


def proven_merge(bare: Policy, loaded: Any, adapter: Path) -> Any:
    """The model with the adapter merged; its log-probabilities are compared with those before."""
    result = merged(loaded)
    groups = probe_groups(bare.vocabulary, bare.max_positions)
    before, after = (logprobs(bare.around(m.eval(), bfloat16=False), groups) for m in (loaded, result))
    gap = float((before - after).abs().max())
    if not gap < MERGED_GAP:
        raise ModelError(
            f"{adapter}: merging this adapter changes log-probabilities by {gap:.2g} nats; "
            "set model.lora to go on training it, or merge it with peft and name the merged folder"
        )
    return result


def _must_be_shaped(loaded: Any, adapter: Path, lora: Lora) -> None:
    """Check the saved adapter against `model.lora`, and set its dropout.

    Raises:
        ModelError: they differ.
    """
    config = loaded.peft_config[adapters.POLICY]
    r, alpha = config.r, float(config.lora_alpha)
    shapes = [(lora.r, lora.alpha)]
    if lora.init_lora_weights is not None:  # such an adapter is saved with twice the rank
        shapes.append(pissa.doubled(lora.r, lora.alpha, use_rslora=lora.use_rslora))
    if (r, alpha) not in shapes:
        raise ModelError(
            f"{adapter}: its adapter has r={r}, alpha={alpha:g} but model.lora says r={lora.r}, "
            f"alpha={lora.alpha:g}; set `model.lora.r={r} model.lora.alpha={alpha:g}` to go on training it"
        )
    if (r, alpha) != shapes[0]:
        console.say(f"{adapter}: its adapter goes on as the LoRA of rank {r} that it was saved as")
    _must_be_of_kind(config, adapter, lora)
    found = adapters.adapted(loaded)
    if lora.target_modules is not None and (wanted := adapters.asked_for(loaded, lora.target_modules)) != found:
        odd = sorted(wanted ^ found)[0]
        asks, has = ("asks for", "lacks") if odd in wanted else ("leaves out", "has")
        raise ModelError(
            f"{adapter}: model.lora.target_modules={lora.target_modules} {asks} {odd}, which its adapter {has}; "
            "leave target_modules out to go on training it"
        )
    if more := [name for name in BEYOND_RECIPES if getattr(config, name) and not getattr(lora, name, None)]:
        console.say(f"{adapter}: its adapter goes on as it was saved, with {', '.join(more)}")
    adapters.set_dropout(loaded, lora.dropout)


def _must_be_of_kind(config: Any, adapter: Path, lora: Lora) -> None:
    """Check that a saved adapter has what `model.lora` asks for beyond low ranks.

    Raises:
        ModelError: it has not.
    """
    lacking = [key for key in ("use_rslora", "use_dora") if getattr(lora, key) and not getattr(config, key)]
    if lora.modules_to_save is not None and {*lora.modules_to_save} != {*(config.modules_to_save or ())}:
        lacking.append("modules_to_save")
    for key in lacking:
        raise ModelError(
            f"{adapter}: model.lora.{key}={getattr(lora, key)}, and its adapter was made with "
            f"{getattr(config, key)}; leave {key} out to go on training it"
        )
