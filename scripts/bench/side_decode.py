"""A side that samples: rlpost's built-in engine, or vLLM's CPU build, whichever its environment has."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gate import Gate

Sample = Callable[[int], int]
"""Seed -> number of tokens that were sampled."""


def of_rlpost(work: dict[str, Any], prompts: list[str]) -> Sample:
    """The engine that stages sample with."""
    from rlpost.api.generation import Generator
    from rlpost.inference.checkpoint import frozen_policy
    from rlpost.policy.params import Model, Precision

    settings = Model(path=work["model"], precision=Precision(work["precision"]))
    model = Generator(work["model"], frozen_policy(work["model"], settings))

    def sample(seed: int) -> int:
        found = model.generate(prompts, n=work["group"], max_new_tokens=work["most"], seed=seed)
        return sum(len(completion.ids) for some in found for completion in some)

    return sample


def of_vllm(work: dict[str, Any], prompts: list[str]) -> Sample:
    """Sampling as its trainers use it."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    from vllm import LLM, SamplingParams

    model = LLM(work["model"], dtype=work["precision"], max_model_len=2048, enable_prefix_caching=True)

    def sample(seed: int) -> int:  # noqa: ARG001 - seeds of requests are refused on a CPU
        settings = SamplingParams(n=work["group"], temperature=1.0, max_tokens=work["most"])
        found = model.generate(prompts, settings, use_tqdm=False)
        return sum(len(completion.token_ids) for some in found for completion in some.outputs)

    return sample


def main() -> None:
    work = json.loads(sys.argv[1])
    prompts = [json.loads(line)["prompt"] for line in Path(work["rows"]).read_text().splitlines()]
    sample = {"rlpost": of_rlpost, "vllm": of_vllm}[work["engine"]](work, prompts)
    gate = Gate()
    for seed in range(work["steps"]):
        tokens = sample(seed)
        gate.passed(tokens=tokens)


if __name__ == "__main__":
    main()
