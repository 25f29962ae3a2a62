"""The directory of one stage: its logs, its checkpoints, its result.

Every method that writes raises DiskError, with one line, when the disk refuses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost import console
from rlpost.errors import DiskError
from rlpost.ranks import first_alone, first_writes
from rlpost.run import logs, names
from rlpost.run.environment import versions
from rlpost.run.files import (
    Json,
    clear_leftovers,
    disk_errors,
    encode_line,
    read_json,
    remove_folder,
    shared_folder,
    write_atomic,
    write_folder_atomically,
    write_json,
)
from rlpost.run.manifest import stranger, verify
from rlpost.run.record import run_id
from rlpost.run.sealed import seal, unseal
from rlpost.run.tensors import SUFFIX, first_not_finite, read_shards, sharded, write_shards, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from rlpost.run.tensors import ShardedAs


BEST = "best"
"""In a checkpoint's state: the step of the best evaluation until then."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint to resume from."""

    path: Path
    step: int
    """Steps done when it was written."""
    state: dict[str, Any]
    """What `save` was given, and `logs`: the proof of the logs until then."""

    def tensors(self, name: str, sharded_as: ShardedAs = lambda _: None) -> dict[str, Tensor]:
        """The tensors saved under this name, on the CPU; of those that were saved in shards, what this rank is to have.

        Raises:
            DiskError: they cannot be read.
        """
        from safetensors.torch import load_file

        path, folder = self.path / f"{name}.safetensors", self.path / f"{name}{SUFFIX}"
        found = read_shards(folder, sharded_as) if folder.is_dir() else {}
        with disk_errors(path):
            # Copies: load_file returns views of the file, which would change, or crash the process with a bus error,
            # if the file changed.
            return found | {key: tensor.clone() for key, tensor in load_file(path).items()}


@dataclass(frozen=True)
class StageDirectory:
    """The directory of one stage."""

    path: Path
    _measured: logs.Known = field(default_factory=dict, repr=False, compare=False)

    @property
    def final(self) -> Path:
        """Folder of the stage's result, once it is done."""
        return self.path / names.FINAL

    @property
    def rows(self) -> Path:
        """Path of the dataset of a stage that makes one; `finish` writes it as `rows.jsonl`."""
        return self.final / names.ROWS

    @property
    def proof(self) -> dict[str, Json]:
        """The content of DONE: `inputs`, `settings` and `logs`; empty without a valid one."""
        path = self.path / names.DONE
        with disk_errors(path):
            data = path.read_bytes() if path.is_file() else b""
        proof = unseal(data) or {}
        run = run_id(self.path.parent)
        own = proof.get("stage") == self.path.name and (run is None or proof.get("run") == run)
        return proof if own else {}

    @property
    def says_done(self) -> bool:
        """Whether DONE is there; nothing is verified."""
        return (self.path / names.DONE).exists()

    @property
    def done(self) -> Path | None:
        """`final` if the stage is done and its result verifies (all of it is read); else None.

        Raises:
            DiskError: the result is undamaged, but of another stage or run.
        """
        if not self.says_done:
            return None
        foreign = stranger(self.final, self._about(None))
        if foreign:
            raise DiskError(
                f"{self.final}: {foreign}; move it away and run the same command again to finish the stage "
                "from its last checkpoint"
            )
        wrong = self.wrong_result()
        if wrong:
            console.warn(f"{wrong}; the stage is finished again from its last checkpoint")
            return None
        for line in self.amiss():
            console.warn(line)
        return self.final

    def amiss(self) -> list[str]:
        """What is wrong with the logs of the finished stage, a line each."""
        known = self.proof.get("logs", {})
        lines = logs.amiss(self.path, known) if known else []
        return [f"{self.path}/{line}; it no longer shows what happened, the result is not touched" for line in lines]

    def wrong_result(self) -> str | None:
        """What is wrong with the finished stage's result or with DONE; None if nothing is."""
        wrong = verify(self.final, self._about(None))
        if wrong:
            return f"{self.final}: {wrong}"
        # A folder outside a run has no id to compare with.
        if run_id(self.path.parent) is None:
            return None
        if not self.proof:
            return f"{self.path / names.DONE}: damaged, or of another stage or run"
        if self.proof["result"] != self._result():
            return f"{self.final}: it is not the result that {names.DONE} is about"
        return None

    def checkpoints(self) -> list[Path]:
        """Folders of checkpoints, oldest first, not verified."""
        folder = self.path / names.CHECKPOINTS
        with disk_errors(folder):
            # Not glob, which treats an unreadable folder as an empty one.
            entries = list(folder.iterdir()) if folder.exists() else []
        return sorted((path for path in entries if not path.suffix and _step(path) >= 0), key=_step)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies and is finite; warns about each newer one that does not."""
        damaged: list[tuple[Path, str]] = []
        found = None
        for path in reversed(self.checkpoints()):
            wrong = verify(path, self._about(_step(path))) or first_not_finite(path)
            if wrong is None:
                found = Checkpoint(path, _step(path), read_json(path / names.STATE))
                break
            damaged.append((path, wrong))
        for path, wrong in damaged:
            instead = f"going on from {found.path.name}" if found else "there is no other valid one: starting over"
            console.warn(f"{path}: {wrong}; {instead}")
        return found

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            DiskError: it is gone or damaged.
        """
        path = self.path / names.CHECKPOINTS / names.step_name(step)
        wrong = (verify(path, self._about(step)) or first_not_finite(path)) if path.exists() else "is gone"
        if wrong is not None:
            raise DiskError(f"{path}: {wrong}; restore it, or remove {self.path} to train the stage again")
        return Checkpoint(path, step, read_json(path / names.STATE))

    @first_alone
    def resume(self) -> Checkpoint | None:
        """The checkpoint to resume from; everything written after it is undone.

        Logs are cut to their length at that time (emptied without a checkpoint), later rollouts and leftovers of a
        kill are removed. Newer checkpoints that failed verification are renamed to `step-000500.broken`, and removed
        once a later checkpoint verifies.
        """
        for folder in (self.path, self.path / names.CHECKPOINTS, self.path / names.ROLLOUTS):
            clear_leftovers(folder)
        checkpoint = self.latest()
        step = checkpoint.step if checkpoint else -1
        logs.take_back(self.path, checkpoint.state["logs"] if checkpoint else {}, step)
        with disk_errors(self.path):
            for path in self.checkpoints():
                if _step(path) > step:
                    broken = path.with_name(path.name + names.BROKEN)
                    if broken.exists():
                        remove_folder(broken)
                    path.rename(broken)
        return checkpoint

    @first_alone
    def reopen(self) -> None:
        """Remove DONE: the finished stage was resumed and is trained further."""
        path = self.path / names.DONE
        with disk_errors(path):
            path.unlink(missing_ok=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl; no times, so that runs can be compared byte for byte.

        Keys keep their order; a number that is not finite becomes null.
        """
        self._append(names.METRICS, step, metrics)

    def logged(self, log: str = names.METRICS) -> list[dict[str, float]]:
        """The lines of a log, numbers only; a line that is damaged is left out."""
        path = self.path / log
        with disk_errors(path):
            text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        found = []
        for line in text.splitlines():
            with suppress(json.JSONDecodeError):
                row = json.loads(line)
                items = row.items() if isinstance(row, dict) else ()
                found.append({key: value for key, value in items if isinstance(value, int | float)})
        return found

    def timing(self, step: int, timing: Mapping[str, float]) -> None:
        """Append a line to timings.jsonl, the only file with wall-clock seconds, rates and memory."""
        self._append(names.TIMINGS, step, timing)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to evaluations.jsonl: held-out metrics after that step."""
        self._append(names.EVALUATIONS, step, metrics)

    @first_writes
    def _append(self, log: str, step: int, numbers: Mapping[str, float]) -> None:
        assert "step" not in numbers, "the step is a key of its own"
        row = {"step": step, **{k: v if isinstance(v, int) else float(v) for k, v in numbers.items()}}
        path = self.path / log
        with disk_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                file.write(encode_line(row))

    @first_alone
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

        Tensors in shards are written by all ranks, to NAME.shards, before the first rank puts everything together.

        Only the newest `keep` checkpoints stay, and those that they name as the best so far (`best` in `state`); others
        are removed after this one was verified.

        Raises:
            DiskError: it could not be written; nothing is left behind and earlier checkpoints are intact.
        """
        assert keep >= 1, keep
        assert "logs" not in state, "`logs` is added here"
        path = self.path / names.CHECKPOINTS / names.step_name(step)
        every = {name: sharded(named) for name, named in tensors.items()}
        parts = {name: found for name, found in every.items() if found}
        if not parts:
            self._save(path, step, tensors, state, keep, [])
        else:
            left = {name: {key: x for key, x in own.items() if key not in every[name]} for name, own in tensors.items()}
            with shared_folder(path) as beside:
                written = [beside / f"{name}{SUFFIX}" for name in parts]
                for folder, found in zip(written, parts.values(), strict=True):
                    write_shards(folder, found)
                self._save(path, step, left, state, keep, written)
        return Checkpoint(path, step, read_json(path / names.STATE))

    @first_alone
    def _save(
        self,
        path: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Json],
        keep: int,
        written: Iterable[Path],
    ) -> None:
        """Write a checkpoint with the folders that were written for it, and prune the others."""
        full = {**state, "logs": logs.prove(self.path, self._measured)}

        def fill(folder: Path) -> None:
            for part in written:
                part.rename(folder / part.name)
            for name, named in tensors.items():
                write_whole(folder / f"{name}.safetensors", named)
            write_json(folder / names.STATE, full)

        write_folder_atomically(path, fill, self._about(step) | {"versions": versions()})
        self._prune(step, keep)

    def _about(self, step: int | None) -> dict[str, Json]:
        return {"run": run_id(self.path.parent), "stage": self.path.name, "step": step}

    def _result(self) -> str:
        """sha256 of the result's manifest."""
        with disk_errors(self.final):
            return hashlib.sha256((self.final / names.MANIFEST).read_bytes()).hexdigest()

    def _prune(self, step: int, keep: int) -> None:
        reached = [path for path in self.checkpoints() if _step(path) <= step]
        with disk_errors(self.path / names.CHECKPOINTS):
            set_aside = (self.path / names.CHECKPOINTS).glob(f"step-*{names.BROKEN}")
            passed = [path for path in set_aside if _step(path.with_suffix("")) <= step]
        best = {_best(path) for path in reached[-keep:]}
        for path in [path for path in reached[:-keep] if _step(path) not in best] + passed:
            remove_folder(path)

    @first_alone
    def finish(
        self, write: Callable[[Path], None], meta: Mapping[str, Json], proof: Mapping[str, Json] | None = None
    ) -> Path:
        """Write the stage's result, `final/`, and then DONE.

        Args:
            write: writes the model or rows into the folder it is given.
            meta: lineage (base model, parent checkpoint, stage, step, recipe hash), saved as checkpoint.json.
            proof: further fields of DONE, besides those on the result and the logs: inputs and settings.

        Raises:
            DiskError: it could not be written; the stage is not done then.
        """
        done = self.path / names.DONE

        def fill(folder: Path) -> None:
            write(folder)
            write_json(folder / names.ABOUT, dict(meta))

        with disk_errors(done):
            done.unlink(missing_ok=True)
        write_folder_atomically(self.final, fill, self._about(None) | {"versions": versions()})
        full = {
            **(proof or {}),
            "run": run_id(self.path.parent),
            "stage": self.path.name,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "result": self._result(),
            "logs": logs.prove(self.path, self._measured),
        }
        write_atomic(done, seal(full))
        return self.final


def _best(checkpoint: Path) -> int | None:
    """The step that a checkpoint names as the best so far."""
    with suppress(DiskError):  # it may be damaged: then it is not gone on from
        step = read_json(checkpoint / names.STATE).get(BEST)
        return step if isinstance(step, int) else None
    return None


def _step(path: Path) -> int:
    """The step in the name, -1 for other names."""
    step = names.step_of(path)
    return -1 if step is None else step
