"""The directory of one stage: its logs, its checkpoints, its result.

Every method that writes raises DiskError, with one line, when the disk refuses.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost import console
from rlpost.run import names
from rlpost.run.environment import versions
from rlpost.run.files import (
    Json,
    clear_leftovers,
    disk_errors,
    encode_line,
    place,
    read_json,
    remove_folder,
    write_atomic,
    write_json,
)
from rlpost.run.manifest import fault, sync

if TYPE_CHECKING:
    from torch import Tensor

_LOGS = (names.METRICS, names.TIMINGS)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that verified: all that training goes on from."""

    path: Path
    step: int
    """Steps done when it was written."""
    state: dict[str, Any]
    """What `save` was given, and `logs`: bytes of each log at that time."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under this name, on the CPU; raises DiskError when they cannot be read."""
        from safetensors.torch import load_file

        path = self.path / f"{name}.safetensors"
        with disk_errors(path):
            # Copies, because what load_file returns is a view of the file: it would change, or end the
            # process with a bus error, if the file did.
            return {key: tensor.clone() for key, tensor in load_file(path).items()}


@dataclass(frozen=True)
class StageDirectory:
    """The directory of one stage."""

    path: Path

    @property
    def final(self) -> Path:
        """Where the stage's result is, once it is done."""
        return self.path / names.FINAL

    @property
    def rows(self) -> Path:
        """Where the rows of a stage that makes rows are: `finish` is to write `rows.jsonl`."""
        return self.final / names.ROWS

    @property
    def done(self) -> Path | None:
        """`final` when the stage is done and its result verifies (all of it is read); otherwise None."""
        if not (self.path / names.DONE).exists():
            return None
        wrong = fault(self.final)
        if wrong:
            console.warn(f"{self.final}: {wrong}; the stage is finished again from its last checkpoint")
            return None
        return self.final

    def checkpoints(self) -> list[Path]:
        """Folders of checkpoints, oldest first, not verified."""
        folder = self.path / names.CHECKPOINTS
        with disk_errors(folder):
            # Not glob, which takes a folder that may not be read for an empty one.
            entries = list(folder.iterdir()) if folder.exists() else []
        return sorted((path for path in entries if not path.suffix and _step(path) >= 0), key=_step)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, naming aloud each newer one that does not."""
        damaged: list[tuple[Path, str]] = []
        found = None
        for path in reversed(self.checkpoints()):
            wrong = fault(path)
            if wrong is None:
                found = Checkpoint(path, _step(path), read_json(path / names.STATE))
                break
            damaged.append((path, wrong))
        for path, wrong in damaged:
            instead = f"going on from {found.path.name}" if found else "no other one is whole: beginning anew"
            console.warn(f"{path}: {wrong}; {instead}")
        return found

    def resume(self) -> Checkpoint | None:
        """The checkpoint to go on from, with everything that was written after it taken back.

        The logs are cut to their length at that time (emptied without a checkpoint), later rollouts and the
        leftovers of a kill are removed. Newer checkpoints that failed verification are renamed to
        `step-000500.broken`, and removed once training has passed them with one that verifies.
        """
        for folder in (self.path, self.path / names.CHECKPOINTS, self.path / names.ROLLOUTS):
            clear_leftovers(folder)
        checkpoint = self.latest()
        step = checkpoint.step if checkpoint else -1
        lengths: Mapping[str, int] = checkpoint.state["logs"] if checkpoint else {}
        for log in _LOGS:
            _cut(self.path / log, lengths.get(log, 0))
        with disk_errors(self.path):
            for path in self.checkpoints():
                if _step(path) > step:
                    broken = path.with_name(path.name + names.BROKEN)
                    if broken.exists():
                        remove_folder(broken)
                    path.rename(broken)
            for path in (self.path / names.ROLLOUTS).glob("step-*.jsonl"):
                if _step(path) > step:
                    path.unlink()
        return checkpoint

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl: nothing of the clock, so that a run can be compared byte for byte.

        Keys keep their order; a number that is not finite becomes null.
        """
        self._append(names.METRICS, step, metrics)

    def timing(self, step: int, seconds: Mapping[str, float]) -> None:
        """Append a line to timings.jsonl, the one place for wall-clock seconds."""
        self._append(names.TIMINGS, step, seconds)

    def _append(self, log: str, step: int, numbers: Mapping[str, float]) -> None:
        assert "step" not in numbers, "the step is a key of its own"
        row = {"step": step, **{k: v if isinstance(v, int) else float(v) for k, v in numbers.items()}}
        path = self.path / log
        with disk_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(encode_line(row))

    def rollouts(self, step: int, rows: Iterable[Mapping[str, Json]]) -> Path:
        """Write rollouts/step-000010.jsonl, whole or not at all."""
        path = self.path / names.ROLLOUTS / f"{names.step_name(step)}.jsonl"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, b"".join(encode_line(row) for row in rows))
        return path

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Json], keep: int
    ) -> Checkpoint:
        """Write checkpoints/step-000500: NAME.safetensors for each name, state.json and the manifest.

        Of the checkpoints only the newest `keep` stay; the others go after this one was verified.

        Raises:
            DiskError: it could not be written; nothing is left behind and the checkpoint before it is intact.
        """
        assert keep >= 1, keep
        assert "logs" not in state, "`logs` is added here"
        path = self.path / names.CHECKPOINTS / names.step_name(step)
        full = {**state, "logs": self._flush_logs()}

        def fill(folder: Path) -> None:
            for name, named in tensors.items():
                _save_tensors(folder / f"{name}.safetensors", named)
            write_json(folder / names.STATE, full)

        place(path, fill, self._about(step))
        self._prune(step, keep)
        return Checkpoint(path, step, read_json(path / names.STATE))

    def _flush_logs(self) -> dict[str, int]:
        lengths = {}
        for log in _LOGS:
            path = self.path / log
            with disk_errors(path):
                if path.exists():
                    sync(path)
                lengths[log] = path.stat().st_size if path.exists() else 0
        return lengths

    def _about(self, step: int | None) -> dict[str, Json]:
        return {"stage": self.path.name, "step": step, "versions": versions()}

    def _prune(self, step: int, keep: int) -> None:
        reached = [path for path in self.checkpoints() if _step(path) <= step]
        with disk_errors(self.path / names.CHECKPOINTS):
            set_aside = (self.path / names.CHECKPOINTS).glob(f"step-*{names.BROKEN}")
            passed = [path for path in set_aside if _step(path.with_suffix("")) <= step]
        for path in reached[:-keep] + passed:
            remove_folder(path)

    def finish(self, write: Callable[[Path], None], meta: Mapping[str, Json]) -> Path:
        """Write the stage's result, `final/`, and then DONE.

        Args:
            write: writes the model or rows into the folder it is given.
            meta: lineage (base model, parent checkpoint, stage, step, recipe hash), saved as checkpoint.json.

        Raises:
            DiskError: it could not be written; the stage is not done then.
        """
        done = self.path / names.DONE

        def fill(folder: Path) -> None:
            write(folder)
            write_json(folder / names.ABOUT, dict(meta))

        with disk_errors(done):
            done.unlink(missing_ok=True)
        place(self.final, fill, self._about(None))
        write_atomic(done, f"{datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
        return self.final


def _step(path: Path) -> int:
    """The step in the name, -1 for other names."""
    step = names.step_of(path)
    return -1 if step is None else step


def _cut(path: Path, length: int) -> None:
    """Take back what was logged after the checkpoint."""
    with disk_errors(path):
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            console.warn(f"{path}: {size} bytes are left of the {length} logged before; going on without them")
        elif size > length:
            os.truncate(path, length)
            sync(path)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors as one safetensors file, which holds each apart: views of one storage are copied."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    save_file(ready, path)
