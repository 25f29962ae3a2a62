"""Recipes for a tiny Llama made from nothing, run in the process of the test, and what they leave on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from engines import asked, local
from safetensors.torch import load_file
from torch import Tensor

from rlpost.engine.params import Sampling
from rlpost.pipeline import train
from rlpost.policy.load import load_policy
from rlpost.policy.params import Lora, Model
from rlpost.policy.policy import Policy
from rlpost.recipe.resolve import Resolved, resolve
from rlpost.types import Completion, Group

MODEL: dict[str, Any] = {
    "config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        # Large enough for a random model to have opinions.
        "initializer_range": 0.15,
    },
    "tokenizer": {"kind": "characters", "alphabet": "0123456789+="},
    "precision": "float32",
}
LORA = "model.lora={r: 4, alpha: 8}"

REWARDS = '''\
"""Rewards that a tiny model can earn."""


def digits(completion, *, digit: str = "1"):
    return completion.text.count(digit)


def always(completion, *, value: float = 1.0):
    return value


def cut_off(completion):
    return float(completion.finish == "length")


def some_unscored(completion, *, digit: str = "1"):
    return None if len(completion.text) < 2 else completion.text.count(digit)


def none(completion):
    return None
'''

SFT: dict[str, Any] = {
    "kind": "sft",
    "data": {"problems": {"task": {"fn": "addition.train"}, "limit": 64}},
    "steps": 4,
    "batch_size": 8,
    "learning_rate": 2e-2,
    "max_length": 16,
}
"""Moves the model far from its base, and teaches it that answers end."""
PAIRS: dict[str, Any] = {
    "kind": "pairs",
    "data": SFT["data"],
    "prompts": 24,
    "group_size": 4,
    "sampling": {"max_new_tokens": 5},
    "rewards": [{"fn": "rewards.py:digits"}],
}
DPO: dict[str, Any] = {
    "kind": "dpo",
    "data": {"pairs": {"path": "pairs.jsonl"}},
    "steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 16,
}
GRPO: dict[str, Any] = {
    "kind": "grpo",
    "data": SFT["data"],
    "steps": 4,
    "prompts_per_step": 4,
    "group_size": 4,
    "sampling": {"max_new_tokens": 5},
    "rewards": [{"fn": "rewards.py:digits"}],
    "learning_rate": 3e-3,
    "max_length": 16,
    "table_every": 1,
}
PPO: dict[str, Any] = {
    **GRPO,
    "kind": "ppo",
    "prompts_per_step": 8,
    "schedule": "constant",
    "critic": {"learning_rate": 1e-2},
}
TRPO: dict[str, Any] = {
    **GRPO,
    "kind": "trpo",
    "learning_rate": 1.0,
    "schedule": "constant",
    "max_kl": 0.02,
    "cg_iterations": 3,
}
PREFERENCES = [
    {"prompt": f"{a}+{b}=", "chosen": f"{(a + b) % 10}{a}", "rejected": f"{(a + b + 1) % 10}"}
    for a in range(3)
    for b in range(3)
]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write(folder: Path, stages: Mapping[str, Any], **top: Any) -> Path:
    """The recipe `folder/tiny.yaml`, with the rewards and pairs that it names beside it."""
    (folder / "rewards.py").write_text(REWARDS, "utf-8")
    jsonl(folder / "pairs.jsonl", PREFERENCES)
    recipe = {"run": "run", "runs": str(folder / "runs"), "threads": 1, "model": MODEL, **top, "stages": stages}
    plain = json.loads(json.dumps(recipe))  # what stands in two places would become an alias
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(plain, sort_keys=False), "utf-8")
    return file


def prepared(folder: Path, stages: Mapping[str, Any], *overrides: str, **top: Any) -> Resolved:
    return resolve(str(write(folder, stages, **top)), overrides)


def run(folder: Path, stages: Mapping[str, Any], *overrides: str, **top: Any) -> Path:
    """Train to the end; returns the last checkpoint."""
    return train(prepared(folder, stages, *overrides, **top))


def metrics(folder: Path, stage: str, run: str = "run") -> list[dict[str, Any]]:
    text = (folder / "runs" / run / stage / "metrics.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def rollouts(folder: Path, stage: str, step: int) -> list[dict[str, Any]]:
    text = (folder / "runs/run" / stage / f"rollouts/step-{step:06d}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def base(folder: Path, run: str = "run") -> Path:
    return folder / "runs" / run / "base"


def weights(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds: a model, or an adapter."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def policy(folder: Path) -> Policy:
    """The frozen policy of a checkpoint."""
    return load_policy(folder, Model(), trainable=False)


def lora_policy(folder: Path) -> Policy:
    return load_policy(folder, Model(lora=Lora(r=4, alpha=8.0)), trainable=True)


def greedy(policy: Policy, *prompts: str) -> list[str]:
    ids = [policy.tokenizer.encode(p) for p in prompts]
    answers = local(policy).generate(asked(ids, 1, Sampling(max_new_tokens=5), [0] * len(ids), greedy=True))
    return [a.text for (a,) in answers]


def group(policy: Policy, prompt: str, *completions: str) -> Group:
    """The group of a row, its completions ended by the end token."""
    ends = policy.tokenizer.eos_token_id
    ids = [(*policy.tokenizer.encode(c), ends) for c in completions]
    return Group(tuple(policy.tokenizer.encode(prompt)), tuple(Completion(i, (True,) * len(i)) for i in ids))
