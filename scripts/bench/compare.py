"""rlpost beside TRL on one workload: the same numbers first, then ratios of neighbouring steps."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gate import BenchError
from limit import has_half, throughput_of, training_operations
from pairs import HERE, WARM, Side, in_turn, ratio, start
from workload import SHAPES, Lengths, Row, make_model, make_rows, trained_model, write_rows

ROOT = HERE.parents[1]
SAME = 1e-5
"""Relative difference of losses and gradient norms, in float32, from which on nothing is compared."""


@dataclass(frozen=True)
class Workload:
    """What both sides train."""

    kind: str
    lengths: Lengths
    size: str = "6M"
    batch: int = 16
    """Rows a step; of GRPO, prompts."""
    group: int = 1
    most: int = 0
    """New tokens of a completion."""
    epochs: int = 1
    rounds: int = 8
    """Counted steps of each side."""
    warm: int = WARM
    """First steps that are not counted."""
    learning_rate: float = 1e-4

    @property
    def lora(self) -> bool:
        """The largest model is trained by adapters."""
        return self.size == "135M"

    @property
    def unit(self) -> str:
        """What a step is about."""
        return {"sft": "tokens", "dpo": "pairs", "grpo": "completions"}[self.kind]


MEDIAN = Lengths(62, 98)
WORKLOADS = {
    "sft": Workload("sft", MEDIAN, rounds=12),
    "dpo": Workload("dpo", MEDIAN, rounds=5),
    "dpo-two-epochs": Workload("dpo", MEDIAN, epochs=2, rounds=5),
    "grpo": Workload("grpo", MEDIAN, batch=8, group=8, most=200, rounds=4, warm=1, learning_rate=1e-6),
    "grpo-short": Workload(
        "grpo", Lengths(8, 5, 0.3), size="0.65M", batch=32, group=16, most=8, rounds=24, learning_rate=1e-6
    ),
    "sft-long": Workload("sft", Lengths(512, 98, 0.3, 1024), rounds=4),
    "grpo-long": Workload(
        "grpo", Lengths(512, 98, 0.3, 1024), batch=8, group=8, most=200, rounds=3, warm=1, learning_rate=1e-6
    ),
    "sft-50M": Workload("sft", MEDIAN, size="50M", rounds=4, warm=1),
    "sft-135M-lora": Workload("sft", MEDIAN, size="135M", batch=8, rounds=3, warm=1),
}
PICK = 1
"""Counted steps by which TRL's best settings are found."""
PLAIN = {"gradient_checkpointing": False}


def candidates(work: Workload, wish: str, tokens: int) -> dict[str, dict[str, Any]]:
    """Settings of TRL that are tried for a few steps each; float32 alone, if rlpost was asked to run in it."""
    found = {"float32": {**PLAIN, "bf16": False}}
    if wish != "float32" and has_half():
        found["bfloat16"] = {**PLAIN, "bf16": True}
    if work.kind == "sft" and not work.lora:
        longest = 1024
        found["float32, packed"] = {
            **found["float32"],
            "packing": True,
            "max_length": longest,
            "per_device_train_batch_size": max(1, round(tokens / longest)),
        }
    if work.epochs > 1:
        found = {name: {**options, "precompute_ref_log_probs": True} for name, options in found.items()}
    return found


def defaults_of_peer() -> dict[str, Any]:
    """Nothing, which means bfloat16: on a processor that has none, twenty times as slow as the float32 it is given."""
    return {} if has_half() else {"bf16": False}


def python_of_peer() -> str:
    """The interpreter of .venv-bench, or of RLPOST_BENCH_PYTHON."""
    python = os.environ.get("RLPOST_BENCH_PYTHON", str(ROOT / ".venv-bench/bin/python"))
    if not Path(python).exists():
        raise BenchError(f"{python}: no such interpreter; `make bench` makes it")
    return python


@dataclass
class Bench:
    """A workload in a folder: starts sides, and has them do their steps."""

    name: str
    work: Workload
    folder: Path
    kept: Path
    """Models are kept here, from one run to the next."""
    wish: str
    """The precision asked for, of rlpost."""
    rounds: int
    sides: list[Side] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """Of rlpost."""
        return precision_of(self.wish, self.work.size)

    @property
    def steps(self) -> int:
        """Of each side, at most."""
        return self.work.warm + PICK + self.rounds

    def prepare(self) -> None:
        """Write the model and the rows; TRL must be there."""
        python_of_peer()
        work, shape = self.work, SHAPES[self.work.size]
        sampled = work.kind == "grpo"
        model = (
            trained_model(self.kept, work.size, work.lengths)
            if sampled
            else make_model(self.kept / f"model-{work.size}", work.size)
        )
        count = -(-self.steps // work.epochs) * work.batch
        rows = make_rows(work.kind, count, work.lengths, shape["vocab_size"])
        self.rows = [rows[i] for i in drawn(count)]
        write_rows(self.folder / "rows.jsonl", work.kind, rows)
        write_rows(self.folder / "rows-in-order.jsonl", work.kind, self.rows)
        if sampled:
            self.common["given"] = given_completions(shape["vocab_size"])
        wanted = ("kind", "batch", "group", "most", "learning_rate", "lora")
        self.common |= {"model": str(model), "steps": self.steps, **{name: getattr(work, name) for name in wanted}}

    def own(self, name: str, precision: str) -> Side:
        """Start a side of rlpost."""
        work = self.common | {"precision": precision, "rows": str(self.folder / "rows.jsonl")}
        return self._start(name, [sys.executable, str(HERE / "side_rlpost.py")], work)

    def peer(self, name: str, options: Mapping[str, Any]) -> Side:
        """Start a side of TRL."""
        work = self.common | {"trl": dict(options), "rows": str(self.folder / "rows-in-order.jsonl")}
        return self._start(name, [python_of_peer(), str(HERE / "side_trl.py")], work)

    def _start(self, name: str, command: list[str], work: dict[str, Any]) -> Side:
        work["folder"] = str(self.folder / name.replace(" ", "-").replace(",", ""))
        self.sides.append(start(f"{self.name}: {name}", command, work))
        self.sides[-1].warm = self.work.warm
        return self.sides[-1]

    def drop(self, side: Side) -> None:
        """End a side that is needed no more."""
        self.sides.remove(side)
        side.end()

    @property
    def batch_rows(self) -> list[list[tuple[int, int]]]:
        """The lengths of a mean batch: all rows, as often as their share in a step."""
        return [row.lengths for row in self.rows]

    @property
    def tokens(self) -> int:
        """Of a mean batch, as padded rows have them: each completion with its prompt."""
        every = sum(p + c for row in self.batch_rows for p, c in row)
        return round(every * self.work.batch / len(self.rows))

    def tuned(self) -> tuple[str, Side, Side]:
        """(name of the best settings, its side, the side in float32), after as many steps as a pick takes."""
        tried: dict[str, Side] = {}
        for name, options in candidates(self.work, self.wish, self.tokens).items():
            tried[name] = side = self.peer(f"TRL {name}", options)
            side.go_on(self.work.warm + PICK - 1)
            packed = side.mean("tokens") if "packed" in name else None
            side.scale = self.tokens / packed if packed else 1.0
            print(f"  TRL, {name}: {statistics.median(side.seconds):.2f} s a step", file=sys.stderr, flush=True)
        best = min(tried, key=lambda name: statistics.median(tried[name].seconds))
        for name, side in tried.items():
            if name != best:
                self.drop(side)
        return best, tried[best], tried["float32"]


def drawn(count: int) -> list[int]:
    """The order in which rlpost draws `count` rows in its first epoch."""
    from rlpost.data.order import Order
    from rlpost.stages.context import stage_seed

    order = Order([count], [1.0], stage_seed(0, "rl", "data"))
    return [order.next().row for _ in range(count)]


def given_completions(vocabulary: int) -> list[dict[str, list[int]]]:
    """Token ids of prompts and completions that both sides score, since each samples its own."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, vocabulary, (8, 32)).tolist()
    return [{"prompt": row[:16], "completion": row[16:]} for row in ids]


def different(own: Mapping[str, float], peer: Mapping[str, float], lora: bool) -> dict[str, float]:
    """Relative differences of the first step: of loss and gradient norm, or of given completions' log-probability."""
    names = ("given_logprob",) if "given_logprob" in own else ("loss", "grad_norm")
    if lora:
        # Adapters begin at random, so that gradients differ.
        names = names[:1]
    return {name: abs(own[name] - peer[name]) / max(abs(peer[name]), 1e-12) for name in names}


def same_numbers(
    name: str, own: Mapping[str, float], peer: Mapping[str, float], lora: bool = False
) -> dict[str, float]:
    """The relative differences of the first step.

    Raises:
        BenchError: one is larger than rounding.
    """
    found = different(own, peer, lora)
    if not all(difference <= SAME for difference in found.values()):
        shown = ", ".join(f"{key} {own[key]:.7g} against {peer[key]:.7g}" for key in found)
        raise BenchError(f"{name}: not compared, since the first step is not TRL's: {shown}")
    return found


def precision_of(wish: str, size: str) -> str:
    """What `model.precision` is on this machine, for a model of that size."""
    from rlpost.policy.load import decide_bfloat16
    from rlpost.policy.params import Precision

    return "bfloat16" if decide_bfloat16(Precision(wish), "cpu", SHAPES[size]["hidden_size"]) else "float32"


def compare(
    name: str, work: Workload, folder: Path, kept: Path, wish: str, rounds: int | None = None
) -> dict[str, Any]:
    """One workload: TRL at its defaults, TRL tuned, rlpost."""
    bench = Bench(name, work, folder, kept, wish, rounds or work.rounds)
    try:
        bench.prepare()
        own = bench.own("rlpost", bench.precision)
        exact = own if bench.precision == "float32" else bench.own("rlpost float32", "float32")
        if exact is not own:
            bench.drop(exact)
        best, tuned, in_float32 = bench.tuned()
        difference = same_numbers(name, exact.steps[0], in_float32.steps[0], work.lora)
        defaults = bench.peer("TRL at its defaults", defaults_of_peer())
        # From here on all are at the same step, with the same rows.
        for side in (own, defaults):
            side.go_on(work.warm + PICK - 1)
        in_turn([own, tuned, defaults], bench.rounds)
        return {**figures(bench, own, tuned, defaults), "trl_tuned": best, "differences": difference}
    finally:
        for side in bench.sides:
            side.end()


def figures(bench: Bench, own: Side, tuned: Side, defaults: Side) -> dict[str, Any]:
    """What was measured, for the table."""
    work = bench.work
    labelled = {"rlpost": own, "TRL tuned": tuned, "TRL defaults": defaults}
    seconds = {label: statistics.median(side.seconds[-bench.rounds :]) for label, side in labelled.items()}
    units = {"sft": bench.tokens, "dpo": work.batch, "grpo": work.batch * work.group}[work.kind]
    found: dict[str, Any] = {
        "workload": bench.name,
        "about": asdict(work),
        "precision": bench.precision,
        "steps_counted": bench.rounds,
        "seconds": seconds,
        "unit": work.unit,
        "rate": {label: units / s for label, s in seconds.items()},
        "peak_gib": {label: side.peak for label, side in labelled.items()},
        "length": {label: side.mean("length") for label, side in labelled.items()},
        "times": {
            label: asdict(ratio(side.seconds[-bench.rounds :], own.seconds[-bench.rounds :]))
            for label, side in labelled.items()
            if side is not own
        },
    }
    if work.kind != "grpo":
        shape = SHAPES[work.size]
        every = training_operations(
            shape, bench.batch_rows, lora=work.lora, reference=(work.kind == "dpo") / work.epochs
        )
        needed = every * work.batch / len(bench.rows)
        limit = throughput_of(shape, bench.tokens, bench.precision)
        found |= {"operations": needed, "limit": limit, "share": needed / seconds["rlpost"] / limit}
    return found
