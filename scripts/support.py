"""What is decided at load for each family of transformers' causal language models, and whether it is right.

    python scripts/support.py             # the whole table, minutes
    python scripts/support.py mamba bert

Models are tiny and random. Scores, the log-probabilities of sampled tokens, and merged adapters are each compared with
the transformers model alone: one unpadded row at a time, plain attention, nothing of rlpost; for LongRoPE, one
prefix at a time. `wrong` at the end must be 0.
"""

from __future__ import annotations

import argparse
import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exactness import sample_groups
from families import EndTokenOnly as EndToken
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlpost.engine.door import frozen_engine
from rlpost.engine.params import Sampling
from rlpost.errors import ModelError
from rlpost.policy import adapters
from rlpost.policy.attention import PLAIN, use_attention
from rlpost.policy.check import check_exactness
from rlpost.policy.load import proven_merge, remove_dropout
from rlpost.policy.params import Lora
from rlpost.policy.policy import Policy
from rlpost.types import Group, Request

VOCABULARY = 64
LAYERS = dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2)
HEADS = dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4)
WIDTH = dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "lru_width", "word_embed_proj_dim"), 32)
INNER = dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48)
LENGTH = dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length"), 128)
EXPERTS = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **LAYERS,
    **HEADS,
    **WIDTH,
    **INNER,
    **LENGTH,
    **EXPERTS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 6,
    "attention_window_size": 6,
    "attention_chunk_size": 6,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "attention_hidden_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rotary_dim": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {"num_key_value_heads": 4, "head_dim": None}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 22,
    "factor": 8.0,
}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), LATENT),
    **{
        name: {"pad_token_id": 1} for name in ("roberta", "camembert", "xlm-roberta", "data2vec-text", "xlm-roberta-xl")
    },
    "falcon": {"alibi": True, "head_dim": None},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 22},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
}
ENCODERS = (
    *("bert", "roberta", "electra", "camembert", "ernie", "rembert", "roformer", "megatron-bert", "data2vec-text"),
    *("xlm-roberta", "bert-generation", "big_bird"),
)
"""Each sees later tokens unless its configuration makes it a decoder, and must be refused."""
FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "ministral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt2"),
    *("gpt_neo", "gpt_neox", "gptj", "codegen", "granite", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "stablelm"),
    *("starcoder2", "glm", "glm4", "helium", "smollm3", "seed_oss", "ernie4_5", "exaone4", "hunyuan_v1_dense"),
    *("nemotron", "persimmon", "arcee", "apertus", "diffllama", "bitnet", "biogpt", "xglm", "opt", "bloom", "mpt"),
    *("falcon", "gpt_bigcode", "openai-gpt", "ctrl", "bart"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "llama4_text", "ernie4_5_moe"),
    *("glm4_moe", "dots1", "minimax_m2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"),
    *("mamba", "mamba2", "falcon_mamba", "recurrent_gemma", "rwkv", "bamba", "jamba", "lfm2", "qwen3_next"),
    *("granitemoehybrid", "minimax"),
    *ENCODERS,
)
EXACT = 2e-4
"""Nats."""


class Wordless(EndToken):
    """What sampling needs of a tokenizer when nobody reads the text."""

    def decode(self, *_: Any, **__: Any) -> str:
        """Nothing."""
        return ""


@dataclass
class Verdict:
    """What was decided for a family."""

    scoring: str = ""
    sampling: str = ""
    lora: str = ""
    merge: str = ""
    wrong: list[str] = field(default_factory=list)
    """What did not hold."""

    @property
    def refused(self) -> bool:
        """It cannot be trained at all."""
        return self.scoring == "refused"


def made(family: str) -> Any:
    """A tiny random model whose weights are large enough for what came before to matter."""
    known = AutoConfig.for_model(family)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)} | OWN.get(family, {})
    sizes = {name: value for name, value in sizes.items() if value is not None or name.endswith("_token_id")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32).eval()
    remove_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model


@torch.no_grad()
def alone(model: Any, groups: list[Group], prefixes: bool) -> Tensor:
    """[N] log-probability of every token of the completions by the model alone."""
    found = []
    for g in groups:
        for c in g.completions:
            row = np.concatenate([g.prompt, c.ids]).tolist()
            for at, token in enumerate(c.ids.tolist()):
                if prefixes or not at:
                    ids = row[: len(g.prompt) + at] if prefixes else row
                    logp = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
                found.append(logp[-1 if prefixes else len(g.prompt) - 1 + at, token])
    return torch.stack(found)


def judge(family: str) -> Verdict:
    """Decide as at load, and compare with the model alone."""
    model = made(family)
    twin = copy.deepcopy(model)
    use_attention(twin, PLAIN)
    exact = check_exactness(model, Wordless())
    verdict = Verdict()
    if exact.refused:
        verdict.scoring = "refused"
        return verdict
    verdict.scoring = "flat" if exact.flat else "single rows" if exact.single else "padded"
    verdict.sampling = str(exact.decoding)
    policy = Policy(model, Wordless(), flat=exact.flat, **exact.ways()).eval()
    prefixes = exact.switch is not None
    groups = [
        Group(g.prompt, tuple(c for c in g.completions if c.actions == len(c.ids) > 0))
        for g in sample_groups(VOCABULARY)
    ]
    groups = [g for g in groups if g.completions]
    with torch.no_grad():
        scored = policy(policy.batch(groups)).logp_N
    _compare(verdict, "scoring", scored, alone(twin, groups, prefixes))
    prompts = [g.prompt for g in groups]
    requests = [Request(p, 2, Sampling(max_new_tokens=12), seed) for seed, p in enumerate(prompts)]
    done = frozen_engine(policy).generate(requests)
    written = [Group(p, cs) for p, cs in zip(prompts, done, strict=True)]
    recorded = torch.tensor(np.concatenate([c.logprobs for cs in done for c in cs]))
    _compare(verdict, "sampling", recorded, alone(twin, written, prefixes))
    _adapted(verdict, policy, groups)
    return verdict


def _adapted(verdict: Verdict, policy: Policy, groups: list[Group]) -> None:
    """An adapter trains, and its merged weights say what it said."""
    try:
        wrapped = adapters.add_policy_adapter(policy.model.requires_grad_(False), Lora(r=2))
    except ModelError:
        verdict.lora = verdict.merge = "refused"
        return
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    dressed = policy.around(wrapped, bfloat16=False).eval()
    logp_N = dressed(dressed.batch(groups)).logp_N
    logp_N.sum().backward()
    gradients = [p.grad for p in dressed.trained().values()]
    moved = any(g is not None and float(g.abs().max()) > 0 for g in gradients)
    verdict.lora = "works"
    if not moved or not all(g is None or bool(g.isfinite().all()) for g in gradients):
        verdict.wrong.append("the adapter's gradient")
    dressed.backward_done()
    with torch.no_grad():
        dressed(dressed.batch(groups))  # some families keep a state between passes, which cannot be copied with a graph
    try:
        plain = policy.around(proven_merge(policy, wrapped, Path("adapter")), bfloat16=False).eval()
    except ModelError:
        verdict.merge = "refused"
        return
    verdict.merge = "works"
    with torch.no_grad():
        _compare(verdict, "merge", plain(plain.batch(groups)).logp_N, logp_N.detach(), 1e-2)


def _compare(verdict: Verdict, what: str, found: Tensor, expected: Tensor, most: float = EXACT) -> None:
    gap = float((found - expected).abs().max())
    if not gap < most:
        verdict.wrong.append(f"{what} by {gap:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    logging.disable(logging.WARNING)
    print(f"{'family':20}{'scoring':13}{'sampling':13}{'LoRA':9}{'merge':9}")
    wrong = 0
    for family in parser.parse_args().families:
        v = judge(family)
        wrong += bool(v.wrong)
        print(f"{family:20}{v.scoring:13}{v.sampling:13}{v.lora:9}{v.merge:9}{', '.join(v.wrong)}", flush=True)
    print(f"wrong: {wrong}")


if __name__ == "__main__":
    main()
