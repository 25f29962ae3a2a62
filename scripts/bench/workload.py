"""What both sides of the benchmark train: a model folder, and rows of lognormal lengths.

Words are drawn at random from a vocabulary of whole words, so that a row has as many tokens as it has words, on both
sides. The model of a workload that samples is trained on such rows first, so that it ends its answers by itself.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gate import BenchError

END, PAD = "<end>", "<pad>"
SHAPES: dict[str, dict[str, Any]] = {
    "0.65M": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    },
    "6M": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "50M": {
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 10,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "vocab_size": 8192,
    },
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
"""Llamas by their size; 135M has the shape of SmolLM2-135M."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and completions: lognormal, with these medians."""

    prompt: int
    completion: int
    spread: float = 0.5
    """Standard deviation of the logarithm."""
    most: int = 512
    """Of one part."""

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """[n] prompts' and completions' lengths."""
        sizes = [np.exp(rng.normal(np.log(median), self.spread, n)) for median in (self.prompt, self.completion)]
        prompt, completion = (np.clip(np.rint(s), 2, self.most).astype(int) for s in sizes)
        return prompt, completion


@dataclass(frozen=True)
class Row:
    """The text of a row; `rejected` only of a pair."""

    prompt: str
    completion: str
    rejected: str = ""

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt's tokens, completion's tokens with its end) of each completion."""
        texts = [text for text in (self.completion, self.rejected) if text]
        return [(len(self.prompt.split()), len(text.split()) + 1) for text in texts]

    def as_json(self, kind: str) -> dict[str, str]:
        """As the file of a kind has it."""
        if kind == "sft":
            return {"prompt": self.prompt, "completion": self.completion}
        if kind == "dpo":
            return {"prompt": self.prompt, "chosen": self.completion, "rejected": self.rejected}
        return {"prompt": self.prompt}


def make_rows(kind: str, n: int, lengths: Lengths, vocabulary: int, seed: int = 0) -> list[Row]:
    """Rows of `sft`, `dpo` or `grpo`."""
    rng = np.random.default_rng(seed)
    prompt, completion = lengths.draw(rng, n)
    _, other = lengths.draw(rng, n)
    rows = []
    for p, c, r in zip(prompt.tolist(), completion.tolist(), other.tolist(), strict=True):
        first, second = _text(rng, p, vocabulary), " " + _text(rng, c, vocabulary)
        rows.append(Row(first, second, " " + _text(rng, r, vocabulary) if kind == "dpo" else ""))
    return rows


def write_rows(file: Path, kind: str, rows: list[Row]) -> None:
    """The rows as a .jsonl file."""
    with file.open("w") as out:
        for row in rows:
            out.write(json.dumps(row.as_json(kind)) + "\n")


def _text(rng: np.random.Generator, n: int, vocabulary: int) -> str:
    # Zipf's law, so that there is something to learn.
    ranks = np.minimum(rng.zipf(1.3, n) + 1, vocabulary - 1)
    return " ".join(f"w{i}" for i in ranks.tolist())


def make_model(folder: Path, size: str, positions: int = 4096, **changes: Any) -> Path:
    """A Llama of random weights with its tokenizer, as a folder; one that is there is taken."""
    if (folder / "made").exists():
        return folder
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {**SHAPES[size], **changes}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model("llama", **shape, **ends, max_position_embeddings=positions, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 1
    model.save_pretrained(folder)
    words = {END: 0, PAD: 1, **{f"w{i}": i for i in range(2, shape["vocab_size"])}}
    core = Tokenizer(WordLevel(words, unk_token=PAD))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=PAD).save_pretrained(folder)
    (folder / "made").touch()
    return folder


def trained_model(work: Path, size: str, lengths: Lengths, steps: int = 150) -> Path:
    """A model that ends its answers by itself at about their median length; made once in the folder `work`."""
    import yaml

    about = [size, asdict(lengths), steps, SHAPES[size]]
    name = f"ends-{size}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}"
    final = work / name / "run/ends/final"
    if final.exists():
        return final
    base = make_model(work / f"model-{size}", size)
    rows = work / f"{name}.jsonl"
    write_rows(rows, "sft", make_rows("sft", steps * 16, lengths, SHAPES[size]["vocab_size"], seed=1))
    stage = {
        "kind": "sft",
        "data": {"rows": {"path": str(rows)}},
        "steps": steps,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "warmup": 0.1,
        "max_length": 2048,
    }
    recipe = work / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"path": str(base), "precision": "float32"}, "stages": {"ends": stage}}))
    print(f"training a {size} model that ends its answers, once", file=sys.stderr)
    command = [sys.executable, "-m", "rlpost", "train", str(recipe), f"runs={work / name}", "run=run"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise BenchError(f"{' '.join(command)} failed: {last}")
    return final
