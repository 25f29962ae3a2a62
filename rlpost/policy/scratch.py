"""A model from scratch: a configuration, random weights, and the recipe's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.errors import RecipeError, RlpostError


def make_model(config: dict[str, Any], tokenizer: Any, seed: int, folder: Path) -> None:
    """Write a randomly initialised causal language model and its tokenizer to `folder`.

    Args:
        config: `model_type` and the fields of that configuration; the vocabulary's size and the special tokens
            are the tokenizer's.
        tokenizer: a fast tokenizer with an end token.
        seed: of the random weights.
        folder: where to write; it exists.

    Raises:
        RecipeError: transformers does not know the model type, refuses the configuration, or the model cannot run.
    """
    fields = dict(config)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise RecipeError("model.config.model_type: missing; say which architecture to make, such as llama")
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    size = fields.get("vocab_size", len(tokenizer))
    if isinstance(size, int) and size < len(tokenizer):
        raise RecipeError(f"model.config.vocab_size={size}: the tokenizer has {len(tokenizer)} tokens; leave it out")
    torch.manual_seed(seed)
    try:
        made = AutoConfig.for_model(kind, **{**special, **fields})
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager")
        _must_run(model)
    except RlpostError:
        raise
    except Exception as error:  # a wrong number in a configuration may raise anything
        raise RecipeError(f"model.config: {_reason(error, fields)}; correct it") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _must_run(model: Any) -> None:
    """Run it once: parts may still not fit each other, such as heads that do not divide its width."""
    logits = model.eval()(torch.zeros(1, 2, dtype=torch.long)).logits
    if not bool(logits.isfinite().all()):
        raise RecipeError("model.config: the model's logits are not finite; check its numbers")


def _reason(error: Exception, fields: dict[str, Any]) -> str:
    """The line of an error that names one of the recipe's fields; else its first line and all fields."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = next((line for line in lines if any(name in line for name in fields)), None)
    given = ", ".join(f"{name}={value}" for name, value in fields.items())
    return named or f"{lines[0]} ({type(error).__name__}, with {given})"
