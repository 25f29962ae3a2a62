"""Whether vLLM can sample from a recipe's model, before anything is loaded or trained."""

from __future__ import annotations

import tempfile

from rlpost.engine.params import VLLM, EngineChoice
from rlpost.engine.vllm_process import must_be_installed, must_run
from rlpost.inference.recipe_model import config_of
from rlpost.recipe.resolve import Resolved
from rlpost.section import walk

SOME = 64
"""Tokens of a tokenizer that is still to be made."""


def must_have_vllm(resolved: Resolved) -> None:
    """Check every section that says `engine: vllm`, if there is one.

    Raises:
        ModelError: vLLM is not installed here, has not the model's family, or not an argument that the recipe gives.
    """
    chosen = {
        where: inner
        for top, section in resolved.config.sections()
        for where, inner in walk(section, top)
        if isinstance(inner, EngineChoice) and inner.engine == VLLM
    }
    for where in chosen:
        must_be_installed(where)
    config = config_of(resolved, SOME) if chosen else None
    if config is None:  # nothing to check, or a file that is converted first
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config.architectures = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for where, choice in chosen.items():
            must_run(folder, where, **{"dtype": "float32", **choice.args})
