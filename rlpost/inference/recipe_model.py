"""The tokenizer, the positions and the configuration of a recipe's model, before there is a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlpost.base_model import scratch_tokenizer
from rlpost.policy.adapter_files import base_of, is_adapter
from rlpost.policy.gguf_files import gguf_file, gguf_positions, gguf_tokenizer
from rlpost.policy.model_files import as_model_error, load_tokenizer, with_chat_template
from rlpost.recipe.resolve import Resolved
from rlpost.run.lookup import find_checkpoint
from rlpost.stage_rows import positions_of


def tokenizer_of(resolved: Resolved) -> Any:
    """Its tokenizer; one of a model from scratch is made, which may take reading its texts.

    Raises:
        ModelError: there is none where the recipe says. DataError: the texts cannot be read.
    """
    model = resolved.config.model
    if model.path is None:
        return with_chat_template(scratch_tokenizer(resolved), model)
    if gguf := gguf_file(model.path):
        return with_chat_template(gguf_tokenizer(gguf), model)
    return load_tokenizer(str(find_checkpoint(model.path) or model.path), model)


def positions_in(resolved: Resolved) -> int:
    """Tokens of the longest row that it has positions for."""
    model = resolved.config.model
    if model.path is None:
        return int(model.config.get("max_position_embeddings") or 1 << 30)
    if gguf := gguf_file(model.path):
        return gguf_positions(gguf)
    return positions_of(find_checkpoint(model.path) or model.path, model.revision)


def config_of(resolved: Resolved, vocabulary: int) -> Any | None:
    """Its configuration in transformers; None of a GGUF file, which is converted first.

    Args:
        resolved: the recipe.
        vocabulary: tokens of its tokenizer, which a model from scratch has.

    Raises:
        ModelError: there is none where the recipe says.
    """
    from transformers import AutoConfig

    model = resolved.config.model
    if model.path is None:
        fields = {"vocab_size": vocabulary, **model.config}
        with as_model_error("model.config"):
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if gguf_file(model.path):
        return None
    found = find_checkpoint(model.path) or Path(model.path)
    base = base_of(found) if is_adapter(found) else str(found)
    with as_model_error(f"{base}: the model's config.json cannot be read"):
        return AutoConfig.from_pretrained(base, revision=model.revision, trust_remote_code=False)
