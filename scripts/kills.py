"""Kills a rank of a run on two processes at random instants, and looks whether the run survives it.

    python scripts/kills.py                     # 20 kills
    python scripts/kills.py --kills 5 --seed 3

A tiny model goes through SFT, pairs, DPO, GRPO and PPO, once undisturbed, and once more while the first rank or the
other is ended by SIGKILL: some steps later, or while a checkpoint or a result is written. Each time the run must end
with exit code 8 and one line, and leave no process; then the same command goes on. What is there in the end must be,
byte for byte, what the undisturbed run left. At last a run is killed on two, one and three processes in turn: the
same up to rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import golden

sys.path.append(str(golden.ROOT / "tests"))
from tiny_recipes import DPO, GRPO, PAIRS, PPO, SFT, sha256, write

LONGEST = 60.0
"""Seconds; whoever takes longer to end, or to get somewhere, hangs."""
EVERY = {"steps": 9, "checkpoint_every": 3, "keep_checkpoints": 1}
STAGES = {
    "sft": {**SFT, **EVERY},
    "pairs": PAIRS,
    "dpo": {**DPO, **EVERY, "data": {"own": {"stage": "pairs"}}},
    "grpo": {**GRPO, **EVERY, "num_minibatches": 2, "kl": {"beta": 0.05}, "reference": "sft"},
    "ppo": {**PPO, **EVERY},
}
MARK = "RLPOST_KILLS"
"""A variable of every process of a run, by which those that were left behind are found."""


class Kill(NamedTuple):
    """How one ended."""

    where: str
    seconds: float
    """Until the command had ended."""
    wrong: str
    """Empty where everything was as it must be."""


def started(recipe: Path, run: str, processes: int) -> subprocess.Popen[str]:
    words = ["train", str(recipe), f"run={run}", f"parallel.processes={processes}"]
    return subprocess.Popen(
        [sys.executable, "-m", "rlpost", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: f"{recipe}:{run}"},
    )


def finished(recipe: Path, run: str, processes: int) -> None:
    """Run to the end.

    Raises:
        RuntimeError: it did not come there, or left something behind.
    """
    process = started(recipe, run, processes)
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(err)
    if leftovers := [*(recipe.parent / "runs" / run).rglob("*.tmp-*")]:
        raise RuntimeError(f"{leftovers[0]} was left")


def marked(value: str) -> list[int]:
    """Processes whose environment has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def ranks_of(process: subprocess.Popen[str], count: int) -> list[int]:
    """The processes of the ranks, by rank; of one process, itself."""
    if count == 1:
        return [process.pid]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    by_rank: dict[int, int] = {}
    for child in children:
        for line in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if line.startswith(b"RANK="):
                by_rank[int(line[5:])] = int(child)
    return [by_rank[n] for n in range(count)]


def reached(run: Path) -> dict[str, int]:
    """Lines of each stage's log."""
    return {log.parent.name: log.read_bytes().count(b"\n") for log in run.glob("*/metrics.jsonl")}


def waited(ready: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Whether something happened before the process ended."""
    deadline = time.monotonic() + LONGEST
    while not ready():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise RuntimeError("it hangs")
        time.sleep(0.0005)
    return True


def killed(recipe: Path, run: str, processes: int, chance: random.Random) -> Kill | None:
    """Start the run, and kill a rank of it somewhere; None if it came to its end before."""
    folder = recipe.parent / "runs" / run
    before = sum(reached(folder).values())
    process = started(recipe, run, processes)
    steps, writing = chance.randint(1, 9), chance.random() < 0.3
    pause, rank = chance.random() * 0.05, chance.randrange(processes)

    def ready() -> bool:
        moved = sum(reached(folder).values()) - before >= steps
        return any(folder.glob("*/checkpoints/*.tmp-*")) or any(folder.glob("*/*.tmp-*")) if writing else moved

    if not waited(ready, process):
        process.communicate()
        return None
    if not writing:
        time.sleep(pause)
    with contextlib.suppress(OSError, KeyError):  # it has just ended
        os.kill(ranks_of(process, processes)[rank], signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=LONGEST)
    seconds = time.monotonic() - began
    if process.returncode == 0:
        return None
    at = ", ".join(f"{name} {n}" for name, n in reached(folder).items())
    where = f"rank {rank} of {processes} after {at}{', writing' if writing else ''}"
    return Kill(where, seconds, _wrong(process, processes, rank, out, err, f"{recipe}:{run}"))


def _wrong(process: subprocess.Popen[str], processes: int, rank: int, out: str, err: str, mark: str) -> str:
    said = [line for line in err.splitlines() if line.startswith("rlpost: ")]
    expected = (8, 1) if processes > 1 else (-signal.SIGKILL, 0)
    if (process.returncode, len(said)) != expected:
        return f"exit code {process.returncode}: {said or err[-300:]}"
    if said and f"rank {rank} of {processes} " not in said[0]:
        return said[0]
    deadline = time.monotonic() + LONGEST
    while left := marked(mark):
        if time.monotonic() > deadline:
            return f"processes {left} were left"
        time.sleep(0.05)
    return f"printed {out}" if out else ""


def left(run: Path) -> dict[str, str]:
    """sha256 of all that must not depend on where the run was interrupted."""
    kept = [*run.glob("*/final/*.safetensors"), *run.glob("*/metrics.jsonl"), *run.glob("*/rollouts/*")]
    return {str(f.relative_to(run)): sha256(f) for f in sorted([*kept, *run.glob("*/final/rows.jsonl")])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many of the run that must end bit for bit the same")
    parser.add_argument("--seed", type=int, default=1, help="of the instants")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, runs = write(folder, STAGES), folder / "runs"
        finished(recipe, "whole", 2)
        expected = left(runs / "whole")
        kills: list[Kill] = []
        number, same = 0, []

        def kill(run: str, processes: int) -> bool:
            found = killed(recipe, run, processes, chance)
            if found:
                kills.append(found)
                print(f"{found.where}: {found.wrong or f'exit in {found.seconds:.1f} s'}", flush=True)
            return found is not None

        while len(kills) < args.kills:
            number += 1
            while len(kills) < args.kills and kill(f"killed{number}", 2):
                pass
            finished(recipe, f"killed{number}", 2)
            same.append(left(runs / f"killed{number}") == expected)
            print(f"run {number}: {'the same bytes' if same[-1] else 'DIFFERS'} as undisturbed", flush=True)
        for processes in (2, 1, 3):
            kill("changing", processes)
        finished(recipe, "changing", 2)
        found, whole = ({"stages": golden.left(runs / run)} for run in ("changing", "whole"))
        for one in (found, whole):
            golden.leave_out_rounding(one)
        difference = golden.compare(found, whole, *golden.OF_RANKS)
    alike = not difference.others and difference.worst <= 1
    good = sum(not kill.wrong for kill in kills)
    print(f"{good} of {len(kills)} kills survived, {sum(same)} of {len(same)} runs the same bytes as undisturbed")
    print(
        f"on 2, 1 and 3 processes in turn: {'the same' if alike else 'DIFFERS'}, largest gap {difference.largest:.1e}"
    )
    if not alike:
        print("\n".join([*difference.others[:3], difference.where]))
    return 0 if good == len(kills) and all(same) and alike else 1


if __name__ == "__main__":
    sys.exit(main())
