"""Loads models and tokenizers with transformers; refuses first what it would ignore or unpickle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file, logging

from rlpost import console
from rlpost.errors import ModelError, RlpostError
from rlpost.policy.adapter_files import ADAPTER_FILE, first_line, read_json_object
from rlpost.policy.params import Model

# Its progress bars for loading and saving would break up those of console.py.
logging.disable_progress_bar()

INDEX = "model.safetensors.index.json"
CONVERT = "convert it to safetensors where you trust it, with transformers' save_pretrained"
_REFUSED = {
    "quantization_config": "its weights are quantised, which is not supported; use the model in bfloat16 or float32",
    "fusion_config": "fusion_config replaces parts of the model, which is not supported; remove it from config.json",
}
_TOKENIZER_FILES = ("token*", "vocab*", "*.model", "tekken.json", "*.gguf")
_NUMBERED = re.compile(r"\.\d+(?=\.|$)")
_BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|\.version)$")
"""Buffers in old checkpoints that are not trained weights."""


@contextmanager
def as_model_error(what: str) -> Iterator[None]:
    """Turn any error of transformers, tokenizers or peft inside into one line.

    Raises:
        ModelError: one was raised.
    """
    try:
        yield
    except (RlpostError, torch.OutOfMemoryError):  # a full GPU is not a fault of the model's files
        raise
    except Exception as error:  # a damaged file may raise anything
        raise ModelError(f"{what}: {_reason(error)}") from error
    except BaseException as error:
        # A panic in the Rust code of tokenizers raises an error that is not an Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what}: {_reason(error)}") from error


def load_model(base: str, revision: str | None, dtype: torch.dtype) -> Any:
    """A causal language model with all weights of its files.

    Args:
        base: a folder or a hub name.
        revision: of a hub name.
        dtype: of the weights.

    Raises:
        ModelError: it cannot be loaded, or weights are missing or do not fit.
    """
    if (Path(base) / ADAPTER_FILE).is_file():
        raise ModelError(f"{base}: an adapter where its base model is expected; merge it into its own base first")
    with _loading(base):
        if not Path(base).is_dir() and hub_file(base, ADAPTER_FILE, revision):
            raise ModelError(f"{base}: an adapter; download it (`hf download {base} --local-dir DIR`) and name DIR")
    config = _config(base, revision)
    _must_be_safe(base, revision, config)
    if (Path(base) / "generation_config.json").is_file():
        # transformers would ignore a damaged one.
        read_json_object(Path(base) / "generation_config.json")
    with _loading(base):
        # Pass the configuration as an object: by name, a key of config.json such as `use_safetensors: false` would
        # replace the argument below.
        model, found = AutoModelForCausalLM.from_pretrained(
            base,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(found["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ModelError(f"{base}: {len(missing)} of the model's weights are missing, {missing[0]} for one")
    if found.get("mismatched_keys"):
        raise ModelError(f"{base}: weights of another shape than config.json says; take both from one model")
    _must_have_read_all(base, model, sorted(found["unexpected_keys"]))
    _must_be_floats(base, model)
    for p in model.parameters():
        # What was read lies in the mapped file: a file written anew would change the weights.
        p.data = p.data.clone()
    return model


def stored_dtype(base: str, revision: str | None) -> torch.dtype:
    """The precision of a model's weights as stored, by its config.json; float32 where that says nothing.

    Raises:
        ModelError: its config.json cannot be read.
    """
    config = _config(base, revision)
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def load_generation_config(folder: Path, model: Any) -> None:
    """Use the generation configuration in an adapter's folder, if there is one, instead of its base's.

    Raises:
        ModelError: it is damaged.
    """
    if (folder / "generation_config.json").is_file():
        read_json_object(folder / "generation_config.json")
        with as_model_error(f"{folder}: generation_config.json cannot be used"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def load_tokenizer(path: str, settings: Model, base: str | None = None) -> Any:
    """The tokenizer in `path`, or else that of `base` (`path` itself by default), with the recipe's chat template.

    Raises:
        ModelError: there is none, or the template's file is missing.
    """
    base = base or path
    own = Path(path) / "tokenizer_config.json"
    source = path if own.is_file() or not Path(path).is_dir() else base
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        if (Path(source) / name).is_file():
            read_json_object(Path(source) / name)
    if Path(source).is_dir() and not any(any(Path(source).glob(name)) for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{path}: it has no tokenizer; copy tokenizer.json and tokenizer_config.json from the model it was made of"
        )
    template = Path(source) / "chat_template.jinja"
    if template.is_file() and not template.read_bytes().strip():
        raise ModelError(f"{template}: an empty chat template; restore it, or remove the file")
    with as_model_error(f"{path}: no tokenizer can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=settings.revision if source == base else None,
            trust_remote_code=False,
        )
        len(tokenizer), tokenizer.eos_token_id, tokenizer.encode("a")
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
        try:
            tokenizer.chat_template = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"model.chat_template: {file} cannot be read: {error}; save it as UTF-8") from error
    return tokenizer


def must_fit(model: Any, tokenizer: Any, path: str) -> None:
    """Check that the tokenizer fits the model, by its ids.

    Raises:
        ModelError: it does not, or has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: its tokenizer has no end token, so a completion could never end; set eos_token")
    rows = model.get_input_embeddings().weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ModelError(f"{path}: two tokens of its tokenizer have one id, so text would not come back; restore it")
    known = max(len(tokenizer), 1 + max(vocabulary.values(), default=0))
    if known > rows:
        raise ModelError(
            f"{path}: the tokenizer knows {known} tokens but the model embeds {rows}; "
            "use the tokenizer the model was trained with"
        )
    ends = getattr(model.generation_config, "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and (not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < rows):
            raise ModelError(
                f"{path}: eos_token_id={end!r} in generation_config.json is not a token of the model; fix it"
            )


def _config(base: str, revision: str | None) -> Any:
    if Path(base).is_dir() and (Path(base) / "config.json").is_file():
        given = read_json_object(Path(base) / "config.json")
        for key, why in _REFUSED.items():
            if any(part.get(key) for part in [given, *given.values()] if isinstance(part, dict)):
                raise ModelError(f"{base}: {why}")
    with _loading(base):
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    for key, why in _REFUSED.items():
        if getattr(config, key, None) or getattr(config.get_text_config(), key, None):
            raise ModelError(f"{base}: {why}")
    return config


def _must_be_safe(base: str, revision: str | None, config: Any) -> None:
    """Refuse weights that are not safetensors files, and adapters that transformers would add by itself."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise ModelError(f"{base}: config.json names its weights ({named!r}), which is not supported; remove the key")
    folder = Path(base)
    if folder.is_dir():
        index = folder / INDEX if (folder / INDEX).is_file() else None
        safe = index or next(folder.glob("*.safetensors"), None)
        if safe is None and (pickled := next((p for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s)), None)):
            raise ModelError(f"{base}: {pickled.name} is a pickle, which is never opened; {CONVERT}")
        if any(folder.glob("shard-*-model-*-of-*.safetensors")):
            raise ModelError(f"{base}: a checkpoint in distributed shards, which is not supported; {CONVERT}")
    else:
        found = hub_file(base, INDEX, revision)
        index = Path(found) if found else None
    if index is not None:
        files = read_json_object(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ModelError(f"{index}: no weight_map, which says where each weight is; restore it")
        for name in files.values():
            if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
                raise ModelError(f"{index}: {name!r} is not a safetensors file of this folder; {CONVERT}")


def hub_file(base: str, name: str, revision: str | None = None) -> str | None:
    """The local path of a file of a hub repository, None if there is none, or no way to it."""
    found: str | None = cached_file(
        base,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def _must_have_read_all(base: str, model: Any, unexpected: list[str]) -> None:
    """Refuse files with weights of a layer that the model does not have: they are another model's."""
    modules = dict(model.named_modules())
    weights = [name for name in unexpected if not _BUFFERS.search(name)]
    further = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None)
    for name in weights:
        owner = modules.get(name.rpartition(".")[0])
        above = (modules.get(name[: found.start()]) for found in _NUMBERED.finditer(name))
        in_a_layer = not further and any(isinstance(m, nn.ModuleList) for m in above)
        if in_a_layer or (owner is not None and any(True for _ in owner.parameters(False))):
            raise ModelError(
                f"{base}: the files hold {name}, which config.json has no place for; "
                "take the weights and config.json from one model"
            )
    if weights:
        console.warn(f"{base}: {len(weights)} weights in its files are not part of the model, {weights[0]} for one")


def _must_be_floats(base: str, model: Any) -> None:
    """Refuse weights stored as integers, which transformers would silently convert."""
    folder = Path(base)
    if not folder.is_dir():
        return
    parameters = {name for name, p in model.named_parameters() if p.is_floating_point()}
    for file in sorted(folder.glob("*.safetensors")):
        with as_model_error(f"{file}: cannot be read"), safe_open(file, "pt") as opened:
            for name in parameters.intersection(opened.keys()):
                if not opened.get_slice(name).get_dtype().startswith(("F", "BF")):
                    raise ModelError(f"{file}: {name} holds whole numbers; {_REFUSED['quantization_config']}")


@contextmanager
def _loading(base: str) -> Iterator[None]:
    try:
        yield
    except RlpostError:
        raise
    except Exception as error:  # as in as_model_error
        raise ModelError(_load_failure(base, error)) from error


def _load_failure(base: str, error: Exception) -> str:
    reason = _reason(error)
    if Path(base).is_dir():
        return f"{base}: the model in this folder cannot be loaded: {reason}"
    if base.startswith((".", "/", "~")):
        return f"{base}: no such folder; give a model folder, a checkpoint or a hub name"
    return f"{base}: neither a local folder nor reachable on the hub ({reason}); check the name, or the connection"


def _reason(error: BaseException) -> str:
    text = first_line(error)
    # A bare key or attribute name says little without the type of the error.
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
