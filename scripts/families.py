"""Tiny randomly initialised models of the families that flat rows must be exact for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen2": {**COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {**COMMON, "head_dim": 8},
    "mistral": {**COMMON, "sliding_window": 7},
    "gemma2": {
        **COMMON,
        "head_dim": 8,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {
        **COMMON,
        "head_dim": 8,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 8,
    },
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}},
    "granite": {**COMMON, "logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {**COMMON, "logit_scale": 0.25},
    "gpt_oss": {
        **COMMON,
        "head_dim": 8,
        "sliding_window": 6,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}
FALLBACK: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
    },
    "llama4_text": {
        **COMMON,
        "head_dim": 8,
        "attention_chunk_size": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
    },
}
"""Families that flat rows cannot serve: position biases (ALiBi), chunks known to the mask alone."""
NO_END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class EndTokenOnly:
    """What `Policy` needs of a tokenizer when nothing is decoded."""

    eos_token_id = 0


def tiny(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 6.0, *, wide: bool = False
) -> Any:
    """A model of `family` whose weights are large enough for attention to matter.

    `wide`: heads of 16, which compiled decoding steps serve.
    """
    torch.manual_seed(seed)
    settings = {**FAMILIES, **FALLBACK}[family]
    if wide:
        settings = {**settings, "hidden_size": 64, "head_dim": 16}
    config = AutoConfig.for_model(family, **settings, **NO_END)
    # Grouped matrix products of experts exist in float32 at most; "eager" ones in float64 too.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    return model.eval()
