"""What the check at load takes, in this tree and in another one, measured in turn.

    python scripts/load_check_time.py --against ../other-tree

Models are random Llamas of 6 and 135 million weights (the second has the shape of SmolLM2-135M), on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "6M": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


class EndTokenOnly:
    """What the check needs of a tokenizer."""

    eos_token_id = 0


def serve(shape: str) -> None:
    """Make a model; then one check for every line on stdin, its seconds on stdout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlpost.policy.check import check_exactness

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPES[shape], max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert check_exactness(model, EndTokenOnly()).flat
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        check_exactness(model, EndTokenOnly())
        print(time.perf_counter() - start, flush=True)


class Worker:
    """One tree's check, in a process of its own that waits between checks."""

    def __init__(self, tree: Path, shape: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--serve", shape]
        self._process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._line() == "ready"

    def seconds(self) -> float:
        """Of one check."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", choices=SHAPES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve)
        return
    here = Path(__file__).parents[1]
    for shape in SHAPES:
        workers = Worker(asked.against or here, shape), Worker(here, shape)
        pairs = [tuple(w.seconds() for w in workers) for _ in range(asked.rounds)]
        for worker in workers:
            worker.close()
        ratio = statistics.median(new / old for old, new in pairs)
        old, new = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{shape:5} {old:.3f} s there, {new:.3f} s here; the median of {asked.rounds} ratios is {ratio:.2f}")


if __name__ == "__main__":
    main()
