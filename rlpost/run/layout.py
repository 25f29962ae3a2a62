"""The run directory: opened by one process at a time, for the recipe it was made for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from rlpost import console
from rlpost.errors import RecipeError, RunInUseError
from rlpost.run import names
from rlpost.run.changes import Change, differences, one_line
from rlpost.run.environment import environment
from rlpost.run.files import Json, clear_leftovers, disk_errors, read_json, write_atomic, write_json
from rlpost.run.lookup import find_checkpoint, list_runs, newest_finished_run, read_config
from rlpost.run.stage import StageDirectory

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["RunDirectory", "find_checkpoint", "list_runs", "newest_finished_run", "open_run"]

_OURS = {names.RECIPE, names.OVERRIDES, names.ENVIRONMENT, names.LOCK, names.HOLDER}
"""What may lie in a run directory before its configuration does, which is written last."""
_REMEDY = "pass --allow-change to go on with the new, or choose another run=NAME"


@dataclass(frozen=True)
class RunDirectory:
    """An open run directory; `open_run` makes it."""

    path: Path

    @property
    def base(self) -> Path:
        """Where a model made from scratch is kept; write it with `files.place`."""
        return self.path / names.BASE

    def stage(self, name: str) -> StageDirectory:
        """The directory of a stage; raises RecipeError for a name that cannot be one."""
        return StageDirectory(names.stage_path(self.path, name))

    def remember(self, key: str, make: Callable[[], Json]) -> Json:
        """The saved answer to what is decided once in a run (precision); `make` decides it the first time."""
        decisions = self._decisions()
        if key not in decisions:
            decisions[key] = make()
            write_json(self.path / names.DECISIONS, decisions)
        return self._decisions()[key]

    def _decisions(self) -> dict[str, Json]:
        path = self.path / names.DECISIONS
        decisions: dict[str, Json] = read_json(path) if path.exists() else {}
        return decisions


@contextmanager
def open_run(
    recipe: DictConfig,
    given: Path | None,
    overrides: Sequence[str],
    allow_change: bool = False,
    functions: Mapping[str, str] | None = None,
) -> Iterator[RunDirectory]:
    """Make or take up runs/NAME, hold its lock, and record the recipe and what it runs on.

    Args:
        recipe: resolved and valid; its `runs` and `run` name the directory.
        given: the recipe's file as the user wrote it.
        overrides: `key=value` as given on the command line.
        allow_change: go on although the recipe differs from the one the run was started with.
        functions: name -> sha256 of the file, for functions from the user's own files.

    Raises:
        RecipeError: the name is malformed, or the run was started with other settings (key: old -> new).
        RunInUseError: another process has it open.
        DiskError: it cannot be written.
    """
    from omegaconf import OmegaConf

    path = names.run_path(Path(recipe.runs), recipe.run)
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        clear_leftovers(path)
        inside = given is not None and given.resolve().is_relative_to(path.resolve())
        files = {names.OVERRIDES: "".join(f"{override}\n" for override in overrides)}
        if given is not None and not inside:
            with disk_errors(given):
                files[names.RECIPE] = given.read_text(encoding="utf-8")
        text = OmegaConf.to_yaml(recipe, resolve=True)
        surroundings = environment(recipe.threads, functions or {})
        if (path / names.CONFIG).exists():
            _take_up(path, text, surroundings, files, allow_change)
        else:
            _begin(path, text, surroundings, files)
        yield RunDirectory(path)


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
        # Left behind on a disk that refuses writes it misleads nobody: it is read while the lock is held.
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _begin(path: Path, text: str, surroundings: Json, files: Mapping[str, str]) -> None:
    with disk_errors(path):
        strangers = sorted(p.name for p in path.iterdir() if p.name not in _OURS)
    if strangers:
        raise RecipeError(
            f"run: {path} holds {strangers[0]} but no {names.CONFIG}: not a run to go on with; "
            "move it away or choose another run=NAME"
        )
    write_json(path / names.ENVIRONMENT, surroundings)
    for name, content in {**files, names.CONFIG: text}.items():
        write_atomic(path / name, content.encode())


def _take_up(path: Path, text: str, surroundings: Json, files: Mapping[str, str], allow_change: bool) -> None:
    old, new = read_config(path), yaml.safe_load(text)
    before = read_json(path / names.ENVIRONMENT)
    changes = [c for c in differences(old, new) if not _stage_may_come_or_go(path, c, old, new)]
    functions = surroundings["functions"]
    for name, sha256 in before["functions"].items():
        if functions.get(name, sha256) != sha256:
            changes.append(Change(f"code of {name}", f"sha256 {sha256[:12]}", f"sha256 {functions[name][:12]}"))
    if changes:
        _refuse_or_warn(path, changes, allow_change)
    newer = [Change(k, v, surroundings["versions"].get(k, "-")) for k, v in before["versions"].items()]
    newer = [change for change in newer if change.old != change.new]
    if newer:
        console.warn(f"{path}: {one_line(newer)}; results may differ in the last digits")
    if before != surroundings:
        _keep_old(path / names.ENVIRONMENT)
        write_json(path / names.ENVIRONMENT, surroundings)
    if old != new:
        _keep_old(path / names.CONFIG)
        for name, content in {**files, names.CONFIG: text}.items():
            write_atomic(path / name, content.encode())


def _refuse_or_warn(path: Path, changes: Sequence[Change], allow_change: bool) -> None:
    if not allow_change:
        raise RecipeError(f"{path}: this run was started with other settings: {one_line(changes)}; {_REMEDY}")
    console.warn(f"{path}: going on with changed settings: {one_line(changes)}")


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
