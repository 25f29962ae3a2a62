"""The memory that `rlpost train --dry-run` estimates, beside what a run takes on a CPU.

    python scripts/memory_check.py                    # SFT and GRPO, all weights and LoRA, 1M, 10M and 50M weights
    python scripts/memory_check.py sft-10M-full grpo-1M-lora

Each case is a process of its own. What is measured is the most anonymous memory while three steps are taken, above
that of the process after a run on a tiny model, which has imported all there is; pages of files are not counted, since
the system takes them back as it likes. It is read every two milliseconds, and falls only between models.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SIZES: dict[str, dict[str, int]] = {
    "1M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "10M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5},
    "50M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10},
}
BUDGETS = {"1M": 4096, "10M": 2048, "50M": 1024}
"""Tokens of a pass: enough that passes count, few enough for a minute or two on one core."""
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"r": 16}},
    "checkpointed": {"gradient_checkpointing": True},
    "plain": {"fast": False},
}
CASES = [f"{kind}-{size}-{way}" for size in SIZES for kind in ("sft", "grpo") for way in ("full", "lora")]
CASES += ["sft-1M-checkpointed", "sft-1M-plain"]
ALPHABET = "".join(chr(0x4E00 + i) for i in range(1000))
REWARD = "def length(completion):\n    return float(len(completion.text) % 7)\n"
TOLERANCE = 0.2


def recipe(folder: Path, run: str, kind: str, size: dict[str, int], way: dict[str, Any], budget: int) -> Path:
    """A recipe whose update is two passes of `budget` tokens: rows of 256 tokens, or 8 samples of 128 a prompt."""
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices(ALPHABET, k=96)), "completion": "".join(draw.choices(ALPHABET, k=159))}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 64)), "utf-8")
    (folder / "rewards.py").write_text(REWARD, "utf-8")
    stage: dict[str, Any] = {
        "kind": kind,
        "data": {"rows": {"path": "rows.jsonl"}},
        "steps": 3,
        "learning_rate": 1e-4,
        "max_length": 256,
        "max_tokens_per_microbatch": budget,
    }
    if kind == "sft":
        stage |= {"batch_size": max(1, 2 * budget // 256)}
    else:
        stage |= {"prompts_per_step": max(1, 2 * budget // 1120), "group_size": 8, "sampling": {"max_new_tokens": 128}}
        stage |= {"rewards": [{"fn": "rewards.py:length"}]}
    model = {
        "config": {"model_type": "llama", "max_position_embeddings": 512, **size},
        "tokenizer": {"kind": "characters", "alphabet": ALPHABET},
        "precision": "float32",
        **way,
    }
    file = folder / f"{run}.yaml"
    text = {"run": run, "runs": str(folder / "runs"), "threads": 1, "model": model, "stages": {"stage": stage}}
    file.write_text(yaml.safe_dump(text), "utf-8")
    return file


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    line = next(x for x in Path("/proc/self/status").read_text("ascii").splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """The most anonymous memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._over = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous())

    def stop(self) -> int:
        """Stop; returns the most bytes there were."""
        self._over.set()
        self.join()
        return max(self.most, anonymous())


def measure(case: str) -> tuple[int, int]:
    """Bytes that are estimated, and those that are taken, in this process."""
    from rlpost.inference.memory_plan import here, plan
    from rlpost.pipeline import train
    from rlpost.recipe.resolve import resolve

    kind, size, way = case.split("-")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(resolve(str(recipe(folder, "tiny", kind, TINY, WAYS[way], 256))))
        resolved = resolve(str(recipe(folder, "run", kind, SIZES[size], WAYS[way], BUDGETS[size])))
        (estimate,) = plan(resolved, here())
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before, peak = anonymous(), Peak()
        peak.start()
        train(resolved)
        return estimate.total, peak.stop() - before


def in_process(case: str) -> tuple[int, int]:
    """The same in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", case], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip().splitlines()[-1]}")
    estimated, measured = json.loads(done.stdout.splitlines()[-1])
    return estimated, measured


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, help=f"KIND-SIZE-WAY, WAY of {', '.join(WAYS)}")
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.one:
        print(json.dumps(measure(given.one)))
        return 0
    print(f"{'case':24}{'estimated MiB':>16}{'measured MiB':>16}{'ratio':>8}")
    wrong = 0
    for case in given.cases:
        estimated, measured = in_process(case)
        ratio = estimated / measured
        wrong += abs(ratio - 1) > TOLERANCE
        print(f"{case:24}{estimated / 2**20:16.0f}{measured / 2**20:16.0f}{ratio:8.2f}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
