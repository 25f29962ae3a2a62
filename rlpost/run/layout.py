"""The run directory: one process at a time opens it, for the recipe it was made for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlpost import console
from rlpost.errors import RecipeError, RlpostError, RunInUseError
from rlpost.ranks import first_alone, first_enters
from rlpost.run import names
from rlpost.run.changes import OF_FILES, Change, Trained, differences, one_line, refusal
from rlpost.run.environment import environment
from rlpost.run.files import Json, clear_leftovers, discard, disk_errors, write_atomic
from rlpost.run.lookup import find_checkpoint, list_runs, newest_finished_run
from rlpost.run.record import (
    Record,
    changed_given,
    digests,
    read_record,
    repair_copies,
    write_copies,
    write_record,
)
from rlpost.run.stage import StageDirectory
from rlpost.strict_yaml import dump

__all__ = ["RunDirectory", "find_checkpoint", "list_runs", "newest_finished_run", "open_run"]

_OURS = {names.RECIPE, names.OVERRIDES, names.ENVIRONMENT, names.CONFIG, names.LOCK, names.HOLDER}
"""What may lie in a run directory before its record does, which is written last."""
_REMEDY = "pass --allow-change to go on with the new, or choose another run=NAME"


@dataclass(frozen=True)
class RunDirectory:
    """An open run directory; `open_run` makes it."""

    path: Path

    @property
    def base(self) -> Path:
        """Folder of a model made from scratch; write it with `files.write_folder_atomically`."""
        return self.path / names.BASE

    @property
    def record(self) -> Record:
        """The content of run.json."""
        record = read_record(self.path)
        assert record is not None, "open"
        return record

    @property
    def trained(self) -> bool:
        """Whether a stage has a checkpoint or a result, which would be lost."""
        return something_trained(self.path)

    def stage(self, name: str) -> StageDirectory:
        """The directory of a stage; raises RecipeError for a name that cannot be one."""
        return StageDirectory(names.stage_path(self.path, name))

    @first_alone
    def decide_once(self, key: str, make: Callable[[], Json]) -> Json:
        """A decision that is taken once in a run (its precision); `make` takes it the first time."""
        decisions = self.record.decisions
        if key not in decisions:
            decisions = json.loads(json.dumps({**decisions, key: make()}))
            write_record(self.path, replace(self.record, decisions=decisions))
            write_copies(self.path, self.record)
        return decisions[key]

    @first_alone
    def record_base(self, contents: Mapping[str, Json]) -> None:
        """Record the contents of the model that the first stage starts from."""
        write_record(self.path, replace(self.record, base=dict(contents)))


@first_enters
@contextmanager
def open_run(
    recipe: Mapping[str, Any],
    given: Path | None,
    overrides: Sequence[str],
    allow_change: bool = False,
    functions: Mapping[str, str] | None = None,
    leaves: Mapping[str, str] | None = None,
) -> Iterator[RunDirectory]:
    """Make or reopen runs/NAME, hold its lock, and record the recipe and the environment.

    Args:
        recipe: resolved and valid, as plain data; its `runs` and `run` name the directory.
        given: the recipe's file as the user wrote it.
        overrides: `key=value` as given on the command line.
        allow_change: go on although the recipe differs from the one the run was started with.
        functions: name -> sha256 of the file, for functions from the user's own files.
        leaves: stage -> its kind of result, for stages whose result is not a policy.

    Raises:
        RecipeError: the name is malformed, or the run was trained with other settings (key: old -> new).
        RunInUseError: another process has it open.
        DiskError: it cannot be written, or its record is damaged.
    """
    path = names.run_path(Path(recipe["runs"]), recipe["run"])
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        clear_leftovers(path)
        inside = given is not None and given.resolve().is_relative_to(path.resolve())
        files = {names.OVERRIDES: "".join(f"{override}\n" for override in overrides)}
        if given is not None and not inside:
            with disk_errors(given):
                files[names.RECIPE] = given.read_text(encoding="utf-8")
        text = dump(recipe)
        now = Record(text, environment(recipe["threads"], functions or {}), digests(files), leaves=dict(leaves or {}))
        record = read_record(path)
        if record is None:
            _begin(path, now, files)
            yield RunDirectory(path)
            return
        repair_copies(path, record, given if inside else None)
        with _taken_back_unless_used(path, record):
            _take_up(path, record, now, files, allow_change)
            yield RunDirectory(path)


def something_trained(run: Path) -> bool:
    """Whether a stage of the run, of whatever recipe, has a checkpoint or a result."""
    with disk_errors(run):
        folders = [p for p in run.iterdir() if p.is_dir() and p.name not in names.FOLDERS]
        return any(_trained(folder).begun for folder in folders)


@contextmanager
def _taken_back_unless_used(path: Path, record: Record) -> Iterator[None]:
    """Restore the records if an error came before anything was trained with an allowed change."""
    before, reached = _records(path), _marks(path)
    try:
        yield
    except RlpostError:
        now = read_record(path)
        if now is not None and len(now.changes) > len(record.changes) and _marks(path) == reached:
            # run.json first: copies that differ from it are rewritten.
            for name in sorted(before, key=lambda name: name != names.RECORD):
                write_atomic(path / name, before[name])
            for name in _records(path).keys() - before.keys():
                discard(path / name)
        raise


def _records(path: Path) -> dict[str, bytes]:
    """The files beside the stages, by name."""
    with disk_errors(path):
        files = [p for p in path.iterdir() if p.is_file() and p.name not in (names.LOCK, names.HOLDER)]
        return {p.name: p.read_bytes() for p in files}


def _marks(path: Path) -> dict[str, tuple[bool, int]]:
    """(done, newest step) of each stage."""
    with disk_errors(path):
        stages = {p.name: _trained(p) for p in path.iterdir() if p.is_dir() and p.name != names.CACHE}
    return {name: (stage.done, stage.step) for name, stage in stages.items()}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock, holder = FileLock(path / names.LOCK), path / names.HOLDER
    with disk_errors(path / names.LOCK):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            pid = holder.read_text().strip() if holder.exists() else ""
            by = f"process {pid}" if pid else "another process"
            raise RunInUseError(f"{path}: in use by {by}; wait for it, or choose another run=NAME") from None
    try:
        write_atomic(holder, f"{os.getpid()}\n".encode())
        yield
    finally:
        # If it cannot be removed it does no harm: it is only read while the lock is held.
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _begin(path: Path, record: Record, files: Mapping[str, str]) -> None:
    with disk_errors(path):
        strangers = sorted(p.name for p in path.iterdir() if p.name not in _OURS)
    if strangers:
        raise RecipeError(
            f"run: {path} holds {strangers[0]} but no {names.RECORD}, so it is not a run that can be resumed; "
            "move it away, restore the file, or choose another run=NAME"
        )
    for name, content in files.items():
        write_atomic(path / name, content.encode())
    write_copies(path, record)
    write_record(path, record)


def _take_up(path: Path, record: Record, now: Record, files: Mapping[str, str], allow_change: bool) -> None:
    """Compare the run with the recipe given now, and record the recipe from now on."""
    same = record.recipe == now.recipe
    old, new = ({}, {}) if same else (record.config, now.config)
    changes = [c for c in differences(old, new) if not _stage_may_come_or_go(path, c, old, new)]
    before, functions = record.environment["functions"], now.environment["functions"]
    for name, sha256 in before.items():
        if functions.get(name, sha256) != sha256:
            what = OF_FILES[0 if ".py:" in name else 1] + name
            changes.append(Change(what, f"sha256 {sha256[:12]}", f"sha256 {functions[name][:12]}"))
    history = record.changes
    if changes and not something_trained(path):
        console.say(f"{path}: nothing was trained yet, so the run takes the recipe as it is now: {one_line(changes)}")
    elif changes:
        stages = _progress(path, record.config, now.config)
        _refuse_or_warn(path, changes, stages, allow_change)
        listed = [{"key": c.key, "old": c.old, "new": c.new} for c in changes]
        history = [*history, {"at": _reached(path, stages), "changes": listed}]
    versions = record.environment["versions"]
    newer = [Change(k, versions.get(k, "-"), v) for k, v in now.environment["versions"].items()]
    newer = [change for change in newer if change.old != change.new]
    if newer:
        console.warn(f"{path}: {one_line(newer)}; results may differ in the last digits")
    # A function that this recipe no longer uses stays recorded, in case it comes back.
    surroundings = {**now.environment, "functions": {**before, **functions}}
    _rewrite(path, record, replace(now, environment=surroundings, changes=history), files)


def _rewrite(path: Path, record: Record, now: Record, files: Mapping[str, str]) -> None:
    """Record the new recipe and environment where they differ, and keep copies of the old ones."""
    damaged = changed_given(path, record)
    for name in damaged:
        console.warn(f"{path / name}: has changed since it was written; it is rewritten as given now")
    recipe, surroundings = record.recipe != now.recipe, record.environment != now.environment
    kept = {name: digest for name, digest in record.given.items() if name not in files}
    given = now.given | kept if recipe or damaged else record.given
    full = replace(now, given=given, decisions=record.decisions, base=record.base, run=record.run)
    if full == record and not damaged:
        return
    for name in [names.ENVIRONMENT] * surroundings + [names.CONFIG] * recipe:
        _keep_old(path / name)
    # The record first: copies that differ from it are rewritten.
    write_record(path, full)
    if recipe or damaged:
        for name, content in files.items():
            write_atomic(path / name, content.encode())
    write_copies(path, full)


def _refuse_or_warn(path: Path, changes: Sequence[Change], stages: Mapping[str, Trained], allow_change: bool) -> None:
    reason = refusal(changes, stages)
    if not allow_change:
        # --allow-change is no remedy for a change that would be refused all the same.
        remedy = _REMEDY if reason is None else f"{reason[0].key}: {reason[1]}"
        raise RecipeError(f"{path}: this run was started with other settings: {one_line(changes)}; {remedy}")
    if reason:
        raise RecipeError(f"{path}: {reason[0]} cannot be applied: {reason[1]}")
    console.warn(f"{path}: going on with changed settings, from here on: {one_line(changes)}")


def _progress(path: Path, old: Json, new: Json) -> dict[str, Trained]:
    """How far every stage of either recipe has come, in the new recipe's order; removed stages where they were."""
    order, before = list(new["stages"]), list(old["stages"])
    for at, name in enumerate(before):
        if name not in order:
            order.insert(order.index(before[at - 1]) + 1 if at else 0, name)
    return {name: _trained(names.stage_path(path, name)) for name in order}


def _trained(folder: Path) -> Trained:
    stage = StageDirectory(folder)
    checkpoints = stage.checkpoints()
    done = (folder / names.DONE).exists()
    return Trained(
        done=done,
        begun=done or bool(checkpoints) or (folder / names.FINAL).exists(),
        extendable=bool(checkpoints) and names.step_of(checkpoints[-1]) == stage.proof.get("step"),
        step=(names.step_of(checkpoints[-1]) or 0) if checkpoints else 0,
        folder=str(folder),
    )


def _reached(path: Path, stages: Mapping[str, Trained]) -> dict[str, Json]:
    """The stage that is resumed, and its step."""
    for name, stage in stages.items():
        if not stage.done:
            checkpoints = StageDirectory(path / name).checkpoints()
            return {"stage": name, "step": names.step_of(checkpoints[-1]) if checkpoints else 0}
    return {"stage": None, "step": None}


def _stage_may_come_or_go(path: Path, change: Change, old: Json, new: Json) -> bool:
    """A stage may be added, removed, enabled or disabled until it is done or a later one begun."""
    parts = change.key.split(".")
    if parts[0] != "stages" or not (len(parts) == 2 or (len(parts) == 3 and parts[2] == "enabled")):
        return False
    name = parts[1]
    order = list((new if name in new["stages"] else old)["stages"])
    later = order[order.index(name) + 1 :]
    done = (names.stage_path(path, name) / names.DONE).exists()
    return not done and not any(names.stage_path(path, other).exists() for other in later)


def _keep_old(path: Path) -> None:
    """Copy config.resolved.yaml to config.resolved.1.yaml, or the first number that is free."""
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    with disk_errors(path):
        data = path.read_bytes()
    write_atomic(kept, data)
