"""Tiny models of families that vLLM has on a CPU (heads of 32), whose random weights have opinions; what is asked."""

from __future__ import annotations

import string
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlpost.engine.params import EngineChoice, Sampling
from rlpost.engine.sampling import filtered, is_greedy
from rlpost.engine.vllm_here import VllmEngine
from rlpost.policy.attention import FLAT, use_attention
from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group, Request

NEEDS_VLLM = [
    pytest.mark.engines,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; `make engines` has it"),
]
WORDS = [*string.ascii_lowercase, *string.digits, *string.ascii_uppercase, "+", "</s>"]
END = len(WORDS) - 1
ROWS = 72
"""More than there are tokens."""
SIZE: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": None,
}
CHOSEN = {"engine": "vllm", "cache_gib": 0.1}
NEAR = 1e-3
"""Mean difference of log-probabilities, in nats a token."""


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def write_model(folder: Path, family: str = "llama", **more: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZE, **more}))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(6)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, *, bfloat16: bool = False, **lora: Any) -> Policy:
    settings = Model(path=str(folder), lora=Lora(**lora) if lora else None)
    return load_policy(folder, settings, bfloat16=bfloat16).eval()


def change(policy: Policy, size: float = 0.05) -> None:
    """A step of training, as far as an engine is concerned; an adapter's B begins at 0."""
    with torch.no_grad():
        for p in policy.trained().values():
            p.add_(torch.randn_like(p) * size)


def requests(count: int, n: int = 1, limit: int = 24, **sampling: Any) -> list[Request]:
    """Prompts of 1 to 40 tokens."""
    draw = np.random.default_rng(7)
    made = Sampling(**sampling) if sampling.get("temperature") != 0 else Sampling().model_copy(update=sampling)
    prompts = [draw.integers(0, END, 1 + i % 40) for i in range(count)]
    return [Request(prompt, n, made, 1000 + i, limit - i % 5) for i, prompt in enumerate(prompts)]


def engine(policy: Policy, **chosen: Any) -> VllmEngine:
    return VllmEngine(policy, EngineChoice(**{**CHOSEN, **chosen}))


def gaps(policy: Policy, asked: Sequence[Request], found: Sequence[tuple[Completion, ...]]) -> np.ndarray:
    """For every token how far its log-probability is from that of the policy's own forward pass."""
    every = []
    for request, completions in zip(asked, found, strict=True):
        for completion in completions:
            logits = next_logits(policy, Group(request.prompt, (completion,)))
            sampling = request.sampling
            if not is_greedy(sampling):
                logits = filtered(logits / sampling.temperature, sampling)
            own = logits.log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None].long())[:, 0]
            every.append((own - torch.tensor(completion.logprobs)).abs().numpy())
    return np.concatenate(every)


def next_logits(policy: Policy, group: Group) -> torch.Tensor:
    """[L, V] the logits of each of its completion's tokens, in one pass of the whole model."""
    (completion,) = group.completions
    row = torch.tensor([*group.prompt.tolist(), *completion.ids.tolist()])[None]
    use_attention(policy.causal_lm, "eager")
    try:
        with torch.no_grad():
            logits = policy.model(row).logits[0, len(group.prompt) - 1 : -1]
    finally:
        use_attention(policy.causal_lm, FLAT)
    return policy.known.cut(logits.float())


def ids(found: Sequence[tuple[Completion, ...]]) -> list[list[int]]:
    return [c.ids.tolist() for some in found for c in some]
