"""What a sandbox costs: seconds a program, one after the other, and programs a second on all cores (docs/sandbox.md).

    python scripts/sandbox_speed.py [--programs 200] [--rounds 5]

A bare Python that does nothing, started the same number of times, is what no sandbox can be faster than.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rlpost.sandbox.levels import why_not
from rlpost.sandbox.outcome import Level
from rlpost.sandbox.process import _python
from rlpost.sandbox.run import run

PROGRAM = "print(sum(range(100)))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200, help="of each kind, in each round")
    parser.add_argument("--rounds", type=int, default=5, help="whose median is taken")
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    kinds: dict[str, Callable[[], object]] = {"bare Python": bare}
    kinds |= {str(level): lambda level=level: run(PROGRAM, level=level) for level in Level if not why_not(level)}
    print(
        f"load {os.getloadavg()[0]:.1f}, {cores} cores, medians of {asked.rounds} rounds of {asked.programs} programs"
    )
    print(f"{'':<12} {'ms a program':>14} {'of computing':>14} {'programs/s on all cores':>26}")
    alone: dict[str, list[float]] = {name: [] for name in kinds}
    computed: dict[str, list[float]] = {name: [] for name in kinds}
    together: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(asked.rounds):  # in turn, so that a busy moment meets all alike
        for name, start in kinds.items():
            before = children()
            alone[name].append(statistics.median(seconds(start) for _ in range(asked.programs)))
            computed[name].append((children() - before) / asked.programs)
            with ThreadPoolExecutor(cores) as pool:
                began = time.perf_counter()
                list(pool.map(lambda _, start=start: start(), range(asked.programs)))
                together[name].append(asked.programs / (time.perf_counter() - began))
    for name in kinds:
        milliseconds = 1000 * statistics.median(alone[name]), 1000 * statistics.median(computed[name])
        each = statistics.median(together[name])
        print(f"{name:<12} {milliseconds[0]:>14.1f} {milliseconds[1]:>14.1f} {each:>26.0f}")


def children() -> float:
    """Seconds that processes have computed which have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def bare() -> None:
    subprocess.run([_python()[0], "-I", "-S", "-c", PROGRAM], env={}, check=True, stdout=subprocess.DEVNULL)


def seconds(start: Callable[[], object]) -> float:
    began = time.perf_counter()
    start()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
