"""Adapters as peft makes them on tiny models, and what models say alone, without this project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_world import byte_tokenizer, save_model, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlpost.policy.params import Lora, Model
from rlpost.types import Completion, Group

LORA = Model(path="x", lora=Lora(r=4, alpha=8.0))
EVERYTHING = Model(path="x")


def drawn(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 250, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


GROUPS = [
    Group(drawn(6, 1), tuple(Completion(drawn(n, n), (True,) * n) for n in (5, 3))),
    Group(drawn(4, 2), (Completion(drawn(7, 7), (True,) * 7),)),
]


@torch.no_grad()
def alone(model: Any, groups: Sequence[Group] = GROUPS) -> Tensor:
    """The log-probability of every token of every completion, by the model itself."""
    found = []
    for g in groups:
        for c in g.completions:
            logp = model(torch.tensor([[*g.prompt, *c.ids]])).logits[0].float().log_softmax(-1)
            found += [float(logp[len(g.prompt) - 1 + i, token]) for i, token in enumerate(c.ids)]
    return torch.tensor(found)


def transformers_alone(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def peft_alone(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(transformers_alone(base), adapter).eval()


def shaken(parameters: Sequence[Tensor], seed: int, size: float = 0.3) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p) * size)


def save_adapter(folder: Path, base: Path, config: Any) -> Path:
    """An adapter made, moved so that all of it shows, and saved by peft."""
    model = get_peft_model(transformers_alone(base), config)
    shaken([p for p in model.parameters() if p.requires_grad], 5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **fields})


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def base_model(here: Path, tied: bool = False) -> Path:
    return save_model(here / "base", tiny_model(tie_word_embeddings=tied, scale=2.0))
