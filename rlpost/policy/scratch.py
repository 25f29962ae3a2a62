"""A model made from nothing: a configuration, random weights, and a tokenizer made by the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.errors import ModelError


def make_model(config: dict[str, Any], tokenizer: Any, seed: int, folder: Path) -> None:
    """Write a randomly initialised causal language model and its tokenizer to `folder`.

    Args:
        config: `model_type` and the fields of that configuration; the vocabulary's size and the special tokens
            are the tokenizer's.
        tokenizer: a fast tokenizer with an end token.
        seed: of the random weights.
        folder: where to write; it exists.

    Raises:
        ModelError: if transformers knows no such model type, or refuses the configuration.
    """
    fields = dict(config)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise ModelError("model.config.model_type: missing; say which architecture to make, such as llama")
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    try:
        made = AutoConfig.for_model(kind, **{**special, **fields})
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelError(f"model.config: {str(error).strip().splitlines()[0]}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
