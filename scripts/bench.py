"""rlpost beside TRL, step by step in turn, and what it costs by itself: `make bench`.

    python scripts/bench.py                              everything but the larger workloads, in half an hour
    python scripts/bench.py --only sft dpo --steps 4     a quick look at two workloads

Both sides train the same model on the same rows with the same optimiser, each in a process of its own by its own
command path, and stand still while the other does a step. Printed are medians of the ratios of neighbouring steps.
The first step's loss and gradient norm must be TRL's, in float32, or a workload is not compared. TRL runs at its
defaults, and with the best settings of a few that are tried first.

RLPOST_BENCH_PYTHON names an interpreter that has TRL (by default that of .venv-bench), RLPOST_BENCH_VLLM_PYTHON one
that has vLLM's CPU build (by default it is left out).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts/bench"), str(ROOT)]

import report  # noqa: E402
import torch  # noqa: E402
from compare import WORKLOADS, compare, precision_of  # noqa: E402
from decode import decode  # noqa: E402
from gate import BenchError  # noqa: E402
from growth import growth  # noqa: E402
from memory import MEMORY, NAMES, memory  # noqa: E402
from start_up import start_up  # noqa: E402

OTHERS = ("decode", "memory", "growth", "start")
DEFAULT = ("sft", "dpo", "dpo-two-epochs", "grpo", "grpo-short", *OTHERS)


def measured(name: str, steps: int | None, kept: Path, wish: str) -> dict[str, Any]:
    """One of what can be asked for."""
    print(f"{name} …", file=sys.stderr, flush=True)
    folder = kept / "last" / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == "decode":
        return decode("6M", folder, kept, precision_of(wish, "6M"), steps or 6)
    if name == "growth":
        return growth(folder, kept, small=steps is not None)
    if name == "start":
        return start_up(folder, ROOT, steps or 7)
    if name.startswith(MEMORY):
        return memory(name.removeprefix(MEMORY), folder, kept, wish)
    return compare(name, WORKLOADS[name], folder, kept, wish, steps)


def single(wanted: list[str]) -> Iterator[str]:
    """`memory` is one measurement for each workload that is not measured anyway."""
    for name in wanted:
        yield from [MEMORY + one for one in NAMES if one not in wanted] if name == "memory" else [name]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*WORKLOADS, *OTHERS]
    parser.add_argument(
        "--only", nargs="+", choices=every, default=list(DEFAULT), metavar="WHAT", help=f"some of {', '.join(every)}"
    )
    parser.add_argument("--steps", type=int, help="counted steps of each side, for a quick look")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of rlpost")
    parser.add_argument("--threads", type=int, default=2, help="of every process")
    parser.add_argument("--kept", type=Path, default=ROOT / ".bench", help="folder of models, kept for the next time")
    parser.add_argument("--out", type=Path, help="folder for bench.json, bench.md and bench.png")
    parser.add_argument("--docs", action="store_true", help="with --out: put them into docs/benchmarks.md as well")
    options = parser.parse_args()
    if options.docs and not options.out:
        parser.error("--docs: give --out FOLDER too")
    for key in ("steps", "threads"):
        number = getattr(options, key)
        if number is not None and number < 1:
            parser.error(f"--{key} {number}: give at least 1")
    # Both sides read it; so does what measures the limit.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    about = report.machine()
    found: list[dict[str, Any]] = []
    failed = []
    for name in single(options.only):
        try:
            found.append(measured(name, options.steps, options.kept.resolve(), options.precision))
        except BenchError as error:
            failed.append(f"{error}")
            print(error, file=sys.stderr, flush=True)
            continue
        for table in report.tables(found[-1:]):
            table.show()
        if options.out:
            report.write(found, about, options.out)
    if len(found) > 1:
        for table in report.tables(found):
            table.show()
    for name, value in about.items():
        print(f"{name}: {value}")
    if options.docs and found:
        report.publish(options.out, ROOT / "docs/benchmarks.md")
    if failed:
        sys.exit("not measured: " + "; ".join(failed))


if __name__ == "__main__":
    main()
