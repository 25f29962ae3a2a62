"""Tokens a second of the local engine and of vLLM, in turn in one process, on a Llama of 6M parameters.

    .venv-engines/bin/python scripts/engine_speed.py             # `make engines` makes that environment
    .venv-engines/bin/python scripts/engine_speed.py --rounds 1 --tokens 8

Random weights and no end token, so that every completion has as many tokens; the same prompts for both. Printed are
the medians of both, and the median of the rounds' ratios, since a machine's speed changes between rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlpost.engine.door import engine_for
from rlpost.engine.params import EngineChoice, Sampling
from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.types import Request

VOCABULARY = 2048
PROMPTS, GROUP, LENGTH = 8, 8, 64
SIZE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": VOCABULARY, "pad_token_id": None}
    config = LlamaConfig(vocab_size=VOCABULARY + 1, max_position_embeddings=1024, num_key_value_heads=4, **SIZE, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"</s>": VOCABULARY}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=5)
    asked.add_argument("--tokens", type=int, default=200)
    args = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        policy = load_policy(folder, Model(path=folder))
    policy.end_ids = ()
    prompts = torch.randint(0, VOCABULARY, (PROMPTS, LENGTH)).tolist()
    requests = [Request(p, GROUP, Sampling(max_new_tokens=args.tokens), i) for i, p in enumerate(prompts)]
    engines = {name: engine_for(policy, EngineChoice(engine=name, cache_gib=1)) for name in ("local", "vllm")}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for round in range(args.rounds + 1):
        for name, engine in engines.items():
            engine.update_weights(policy, round)
            begun = time.perf_counter()
            found = engine.generate(requests)
            seconds = time.perf_counter() - begun
            tokens = sum(len(c.ids) for some in found for c in some)
            assert tokens == PROMPTS * GROUP * args.tokens
            if round:  # the first warms up
                speeds[name].append(tokens / seconds)
    for name, engine in engines.items():
        engine.close()
        sys.stdout.write(f"{name:6} {statistics.median(speeds[name]):8.0f} tokens/s\n")
    ratios = [v / own for v, own in zip(speeds["vllm"], speeds["local"], strict=True)]
    sys.stdout.write(f"vllm / local {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n")


if __name__ == "__main__":
    main()
