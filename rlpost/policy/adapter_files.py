"""Reads an adapter's folder and checks all of it before a model is touched.

peft ignores what it does not know, fills missing weights with fresh ones and unpickles `adapter_model.bin`. Here an
adapter is a LoRA of a kind that is known to work next to others on one base, or it is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlpost.errors import ModelError
from rlpost.run.names import ABOUT, FROM_HERE

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MERGE = "merge it into its base with peft's merge_and_unload and name the merged folder"


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter's folder."""

    folder: Path
    config: LoraConfig
    weights: dict[str, Tensor]
    """Names as in the file."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's."""
    return (folder / ADAPTER_FILE).is_file()


def read_adapter(folder: Path) -> SavedAdapter:
    """The adapter in `folder`.

    Raises:
        ModelError: there is none, it is damaged, or of a kind that is not supported next to others.
    """
    return SavedAdapter(folder, read_adapter_config(folder), _weights(folder))


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration in `folder`; every field is checked.

    Raises:
        ModelError: it is not a LoRA, or one with a field that is wrong or not supported.
    """
    from peft import LoraConfig

    given = read_json_object(folder / ADAPTER_FILE)
    kind = given.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder}: peft_type={kind!r} in {ADAPTER_FILE}, where LORA is supported; {MERGE}")
    for name in ("r", "lora_alpha", "target_modules"):
        if name not in given:
            raise ModelError(f"{folder}: no {name} in {ADAPTER_FILE}; restore the file from where it came")
    for name, allowed in _FIELDS.items():
        if name in given and not allowed(given[name]):
            raise ModelError(f"{folder}: {name}={_short(given[name])} in {ADAPTER_FILE} is not supported; {MERGE}")
    defaults = {f.name: getattr(LoraConfig(), f.name) for f in fields(LoraConfig)}
    for name in given.keys() - _FIELDS.keys() - _IGNORED:
        value = given[name]
        if value not in (None, False, "", [], {}) and (name not in defaults or value != defaults[name]):
            raise ModelError(f"{folder}: {name}={_short(value)} in {ADAPTER_FILE} is not supported; {MERGE}")
    try:
        return LoraConfig(**{k: v for k, v in given.items() if k in _FIELDS or k in ("peft_type", "task_type")})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder}: {ADAPTER_FILE}: {first_line(error)}; {MERGE}") from error


def base_of(adapter: Path) -> str:
    """The base model that an adapter folder names: relative to its own run, or by path or hub name.

    Raises:
        ModelError: if it names none.
    """
    about = read_json_object(adapter / ABOUT) if (adapter / ABOUT).is_file() else {}
    inside = about.get(f"base{FROM_HERE}")
    if isinstance(inside, str) and (adapter / inside / "config.json").is_file():
        return str((adapter / inside).resolve())
    named = about.get("base") or read_json_object(adapter / ADAPTER_FILE).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise ModelError(
            f"{adapter}: an adapter that names no base model; add base_model_name_or_path to {ADAPTER_FILE}"
        )
    return named


def base_revision(adapter: Path) -> str | None:
    """The revision of the base on the hub that an adapter was trained on; None where its folder names none."""
    found = read_json_object(adapter / ADAPTER_FILE).get("revision")
    return found if isinstance(found, str) and found else None


def same_model(one: str | Path, other: str | Path) -> bool:
    """Whether two paths or names mean one model."""
    if str(one) == str(other):
        return True
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ModelError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}; restore it from where it came") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds a {type(found).__name__} where an object is expected; restore it")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLED).exists():
            raise ModelError(
                f"{folder}: {PICKLED} is a pickle, which is never opened; load it with peft where you trust it, "
                f"and save it with save_pretrained, which writes {WEIGHTS_FILE}"
            )
        raise ModelError(f"{folder}: an adapter without {WEIGHTS_FILE}; copy the whole folder")
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{file}: cannot be read: {first_line(error)}; restore it from where it came") from error
    for name, x in weights.items():
        if not x.is_floating_point() or not bool(torch.isfinite(x).all()):
            raise ModelError(f"{file}: {name} holds a value that is not finite ({x.dtype}); restore the file")
    return weights


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(item, str) for item in x)


def _wholes(x: Any) -> bool:
    return isinstance(x, list) and all(_whole(item) and item >= 0 for item in x)


def _by_name(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(x: Any) -> bool:
        return x is None or (isinstance(x, Mapping) and all(map(allowed, x.values())))

    return check


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "r": lambda x: _whole(x) and x >= 1,
    "lora_alpha": lambda x: _number(x) and x > 0,
    "lora_dropout": lambda x: _number(x) and 0 <= x < 1,
    "target_modules": lambda x: bool(x) and (isinstance(x, str) or _texts(x)),
    "exclude_modules": lambda x: x is None or isinstance(x, str) or _texts(x),
    "layers_to_transform": lambda x: x is None or _whole(x) or _wholes(x),
    "layers_pattern": lambda x: x is None or isinstance(x, str) or _texts(x),
    "rank_pattern": _by_name(lambda x: _whole(x) and x >= 1),
    "alpha_pattern": _by_name(lambda x: _number(x) and x > 0),
    "use_rslora": lambda x: isinstance(x, bool),
    "use_dora": lambda x: isinstance(x, bool),
    "fan_in_fan_out": lambda x: isinstance(x, bool),
    "modules_to_save": lambda x: x is None or _texts(x),
    "trainable_token_indices": lambda x: x is None or _wholes(x) or _by_name(_wholes)(x),
    # Other ways to initialise change the base's own weights, and again for every further adapter.
    "init_lora_weights": lambda x: isinstance(x, bool) or x in ("gaussian", "orthogonal"),
    # Trained biases are the base's own: other adapters on that base would change too.
    "bias": lambda x: x == "none",
    "task_type": lambda x: x in (None, "CAUSAL_LM"),
}
"""Fields that may differ from their default, and their allowed values."""
_IGNORED = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
"""Fields that change no result."""
