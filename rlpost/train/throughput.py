"""How fast a stage trains, how much memory it took, and what a step's time went to: for timings.jsonl and progress."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence

import torch

from rlpost.train.learner import Learner

PARTS = ("sampling", "scoring", "waited", "learning")
"""What the time of a step that samples goes to; `learning` is all that is none of the others. Where sampling is ahead
of training, a step waits for it at most."""

SPEED = "tok/s"


class Throughput:
    """Measures one step after the other; nothing of it reaches metrics or the state of training."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        """Count the tokens and samples that these learn from, unless `count` says what a step is about."""
        self._learners = learners
        self._spent: dict[str, float] = {}
        self._counted: tuple[int, int] | None = None
        self._trained = (0, 0)
        self._began = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._spent, self._counted, self._trained = {}, None, self._totals()
        self._began = time.perf_counter()

    def spent(self, parts: Mapping[str, float]) -> None:
        """Seconds of the step that went to sampling, to scoring, or to waiting for both."""
        self._spent = dict(parts)

    def count(self, tokens: int, samples: int) -> None:
        """What the step has worked through: sampled tokens and completions."""
        self._counted = (tokens, samples)

    def end(self) -> dict[str, float]:
        """The step's seconds and their parts, tokens and samples a second of this process, peak memory in bytes."""
        seconds = time.perf_counter() - self._began
        totals = self._totals()
        tokens, samples = self._counted or (totals[0] - self._trained[0], totals[1] - self._trained[1])
        parts = dict(self._spent)
        if parts:
            parts["learning"] = max(0.0, seconds - sum(parts.values()))
        rates = {"tokens_per_second": tokens / seconds, "samples_per_second": samples / seconds}
        return {"seconds": seconds, **parts, **rates, "peak_memory": peak_memory()}

    def _totals(self) -> tuple[int, int]:
        first = self._learners[0]
        return first.trained_tokens, first.trained_samples


def peak_memory() -> int:
    """Bytes: the most that tensors took on the GPU so far, or without one the most that this process took."""
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return int(allocated)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def shown(timing: Mapping[str, float]) -> dict[str, float]:
    """What the progress line shows of a step: tokens a second, percent of it by part, peak memory in GiB."""
    percent = {f"{part}%": round(100 * timing[part] / timing["seconds"]) for part in PARTS if part in timing}
    return {SPEED: round(timing["tokens_per_second"]), **percent, "GiB": timing["peak_memory"] / 2**30}
