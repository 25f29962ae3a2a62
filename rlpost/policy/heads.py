"""The output head of a model, reproduced so that it can run on tiles of hidden states.

A head is more than `lm_head`: Gemma 2 soft-caps its logits, Granite divides them, Cohere multiplies. The check at load
(check.py) compares the reproduction with the model; if they differ, the model's own forward computes the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlpost.policy.logprobs import Head


def reproduced_head(model: Any) -> Head:
    """[n, D] hidden states -> [n, V] logits as `model` computes them.

    Args:
        model: a transformers causal language model.
    """
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    divide = getattr(config, "logits_scaling", None) or 1.0
    multiply = getattr(model, "logit_scale", None) or getattr(config, "logit_scale", None) or 1.0

    def head(hidden: Tensor) -> Tensor:
        # Looked up at every call: an adapter may have replaced the layer since.
        logits: Tensor = model.get_output_embeddings()(hidden)
        if multiply != 1.0 or divide != 1.0:
            logits = logits * (multiply / divide)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head
