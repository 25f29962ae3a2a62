"""The logs of a stage and their proof: size and sha256 of each file, by name within the stage's folder.

A checkpoint holds the proof of the logs until then, DONE that of the whole stage's.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from rlpost import console
from rlpost.run import names
from rlpost.run.files import disk_errors
from rlpost.run.manifest import measure, sync

LOGS = (names.METRICS, names.TIMINGS, names.EVALUATIONS)

Proof = dict[str, dict[str, Any]]
"""Name -> {"size": bytes, "sha256": ...}."""
Known = MutableMapping[tuple[str, int, int, int], dict[str, Any]]
"""(name, size, modification time, inode) -> measurement: rollouts never change, so they are read once."""


def prove(stage: Path, known: Known) -> Proof:
    """Flush the logs, and measure them and the rollouts; raises DiskError."""
    proof: Proof = {}
    for log in LOGS:
        path = stage / log
        with disk_errors(path):
            if path.exists():
                sync(path)
            elif log == names.EVALUATIONS:
                continue  # nothing is evaluated while this stage trains
            proof[log] = measure(path) if path.exists() else {"size": 0, "sha256": None}
    for path in _rollouts(stage):
        with disk_errors(path):
            stat = path.stat()
            key = (path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if key not in known:
                known[key] = measure(path)
            proof[f"{names.ROLLOUTS}/{path.name}"] = known[key]
    return proof


def take_back(stage: Path, proof: Proof, step: int) -> None:
    """Cut the logs to the length in the proof and remove rollouts after `step`; warns about damage before that.

    Raises:
        DiskError: the disk refused.
    """
    for log in LOGS:
        _cut(stage / log, proof.get(log, {"size": 0})["size"])
    for path in _rollouts(stage):
        if (names.step_of(path) or 0) > step:
            with disk_errors(path):
                path.unlink()
    for line in amiss(stage, proof):
        console.warn(f"{stage}/{line}; it is kept as it is")


def amiss(stage: Path, proof: Proof) -> list[str]:
    """Differences from the proof, a line each: `metrics.jsonl: has changed since it was written`."""
    lines = []
    for name, written in proof.items():
        path = stage / name
        with disk_errors(path):
            if not path.exists():
                if written["size"]:
                    lines.append(f"{name}: is missing")
            elif (size := path.stat().st_size) != written["size"]:
                lines.append(f"{name}: {size} bytes are left of the {written['size']} logged before")
            elif written["size"] and measure(path) != {key: written[key] for key in ("sha256", "size")}:
                lines.append(f"{name}: has changed since it was written")
    more = [p.name for p in _rollouts(stage) if f"{names.ROLLOUTS}/{p.name}" not in proof]
    return lines + [f"{names.ROLLOUTS}/{name}: was not written by this stage" for name in more]


def _rollouts(stage: Path) -> list[Path]:
    folder = stage / names.ROLLOUTS
    with disk_errors(folder):
        return sorted(folder.glob("step-*.jsonl"))


def _cut(path: Path, length: int) -> None:
    """Cut off what was logged after the checkpoint."""
    with disk_errors(path):
        if path.exists() and path.stat().st_size > length:
            os.truncate(path, length)
            sync(path)
