"""Tiny models, tokenizers, rows and recipes in a folder of their own, and the command line run in this process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlpost.cli.app import main

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": None,
}


def byte_tokenizer(
    template: str | None = CHATML, *, eos: str = "<|im_end|>", more: Iterable[str] = (), **fields: Any
) -> PreTrainedTokenizerFast:
    """256 bytes, `<|endoftext|>`, ChatML's two markers, and `more` special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more])
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>", **fields)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(
    family: str = "llama", vocabulary: int = 259, *, seed: int = 0, scale: float = 1.0, **fields: Any
) -> Any:
    """A random model in float32; `scale` multiplies its matrices, for one with opinions."""
    torch.manual_seed(seed)
    own = LLAMA if family == "llama" else {}
    config = AutoConfig.for_model(family, **{**own, "vocab_size": vocabulary, **fields})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def save_model(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    """A model folder as a user has it: weights, config, tokenizer."""
    tokenizer = tokenizer or byte_tokenizer()
    (model if model is not None else tiny_model(vocabulary=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def save_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    plain = json.loads(json.dumps(recipe))  # what stands in two places would become an alias
    path.write_text(yaml.safe_dump(plain, sort_keys=False), "utf-8")
    return path


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last line on stderr: the error, if there is one."""
        return (self.err.strip().splitlines() or [""])[-1]

    def refused(self, code: int, *words: str) -> bool:
        """One line of error with these words, no traceback, this exit code, nothing on stdout."""
        return self.code == code and "Traceback" not in self.err and not self.out and all(w in self.line for w in words)


def rlpost(*words: object) -> Ran:
    """`rlpost WORDS` in this process: no second import of torch."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["rlpost", *map(str, words)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                traceback.print_exc(file=err)
                code = 1
    finally:
        sys.argv = argv
    return Ran(code, out.getvalue(), err.getvalue())
