"""Writes a GGUF file as one ordinary model folder: `rlpost import-gguf`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpost import console
from rlpost.data.chat import probe
from rlpost.errors import DiskError, ModelError
from rlpost.inference.merge import must_be_new
from rlpost.policy.model_files import as_model_error, must_fit
from rlpost.run.files import discard, disk_errors
from rlpost.run.names import unfinished

_MAGIC = b"GGUF"
_PADS = ("<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
"""Tokens that pad in the families that have one; the first that is in the vocabulary and ends no turn."""


def import_gguf(file: str, out: str) -> str:
    """Write a GGUF file's weights in float32, its tokenizer and chat template as a model folder; returns `out`.

    The end token is the one with which the chat template ends an assistant's turn: a GGUF file may name another.

    Args:
        file: the GGUF file.
        out: a folder that does not exist yet.

    Raises:
        DiskError: `out` exists, `file` cannot be read, or `out` cannot be written.
        ModelError: it is no GGUF file, transformers cannot read its architecture, its template shows no end token, or
            the package gguf is missing.
    """
    source, target = Path(file), must_be_new(out)
    _must_be_gguf(source)
    tokenizer = _tokenizer(source)
    model = _model(source)
    must_fit(model, tokenizer, file)
    _name_tokens(model, tokenizer)
    temporary = unfinished(target)
    with disk_errors(target):
        try:
            discard(temporary)
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            _must_end_alike(temporary, tokenizer)
            temporary.rename(target)
        finally:
            discard(temporary)
    console.say(f"{out}: end token {tokenizer.eos_token}, as the chat template ends turns; pad {tokenizer.pad_token}")
    return out


def _must_be_gguf(source: Path) -> None:
    if not source.is_file():
        raise DiskError(f"{source}: no such file; name a GGUF file")
    with disk_errors(source), source.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ModelError(f"{source}: not a GGUF file, which begins with the letters GGUF; name one")
    if find_spec("gguf") is None:
        raise ModelError(f"{source}: reading it needs the package gguf: pip install 'rlpost[gguf]'")


def _tokenizer(source: Path) -> Any:
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
    with as_model_error(f"{source}: transformers cannot read this model"):
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
