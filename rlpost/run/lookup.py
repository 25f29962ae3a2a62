"""Finds runs and checkpoints by what a user types."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlpost import console
from rlpost.errors import DiskError, ModelError
from rlpost.run import names
from rlpost.run.files import disk_errors
from rlpost.run.manifest import verify
from rlpost.run.record import read_record, run_id
from rlpost.run.stage import StageDirectory
from rlpost.suggest import closest

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REPAIR = "run its `rlpost train` again to repair it, or take another checkpoint"


@dataclass(frozen=True)
class RunSummary:
    """A run in short; nothing is verified."""

    path: Path
    description: str
    stages: dict[str, str]
    """Enabled stage -> "done", "step 500" (its newest checkpoint), "begun", or "" when it has not begun."""
    finished: float | None
    """Seconds since the epoch at which its last enabled stage was done; None while it is not."""


def list_runs(runs: Path) -> list[RunSummary]:
    """Every run in the folder, by name; raises DiskError for one whose configuration cannot be read."""
    return [_summary(path.parent) for path in sorted(runs.glob(f"*/{names.CONFIG}"))]


def newest_finished_run(runs: Path) -> Path:
    """The run whose last enabled stage was done last.

    Raises:
        ModelError: no run in the folder is finished.
    """
    finished = [(run.finished, run.path) for run in list_runs(runs) if run.finished is not None]
    if not finished:
        raise ModelError(f"{runs}: no finished run; finish one with `rlpost train RECIPE` or name a checkpoint")
    return max(finished)[1]


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint a user means by a path: a final one, that of a stage or a run, or a step's.

    Returns:
        The folder, verified; None for a plain model folder, or a name that may be on the hub: the caller loads it as
        a model.

    Raises:
        ModelError: it names no finished checkpoint.
        DiskError: the checkpoint is not as it was written.
    """
    folder = Path(path)
    if not folder.exists():
        if _may_be_on_hub(str(path)):
            return None
        raise ModelError(f"{folder}: no such folder; {_did_you_mean(folder)}")
    if folder.is_file() and folder.suffix == ".gguf":
        raise ModelError(f"{folder}: no checkpoint here; write it as one with `rlpost import-gguf {folder} OUT`")
    role = names.role(folder)
    if role == "checkpoint":
        return _verified(folder)
    if role == "run":
        return _of_run(folder)
    if role == "stage":
        return _of_stage(folder)
    if role == "model":
        if (folder / names.MANIFEST).exists():
            _verified(folder)
        return None
    inside = list_runs(folder) if folder.is_dir() else []
    newest = max(inside, key=lambda run: run.finished or 0.0, default=None)
    remedy = f"did you mean {newest.path}?" if newest else "give a run, a stage or a folder with a model"
    raise ModelError(f"{folder}: no checkpoint here; {remedy}")


def parent_of(checkpoint: Path) -> Path:
    """The model that the stage which wrote a checkpoint started from.

    Raises:
        ModelError: the checkpoint does not say, or that model is gone.
    """
    about = checkpoint / names.ABOUT
    known: dict[str, Any] = json.loads(about.read_text("utf-8")) if about.is_file() else {}
    inside = known.get(f"parent{names.FROM_HERE}")
    if isinstance(inside, str) and (checkpoint / inside).is_dir():
        return (checkpoint / inside).resolve()
    parent = known.get("parent")
    if parent is None:
        raise ModelError(f"{checkpoint}: it does not say which policy it was trained for; name it with --policy")
    if not Path(parent).is_dir() and not _may_be_on_hub(parent):
        raise ModelError(f"{checkpoint}: trained for {parent}, which is gone; name that model with --policy")
    return Path(parent)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run as plain data; raises DiskError when it cannot be read."""
    record = read_record(run)
    if record is not None:
        return record.config
    path = run / names.CONFIG
    with disk_errors(path):
        text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = str(error).partition("\n")[0]
        raise DiskError(f"{path}: not YAML ({reason}); restore it or choose another run=NAME") from error
    if not isinstance(config, dict) or not isinstance(config.get("stages"), dict):
        raise DiskError(f"{path}: not a resolved recipe; restore it or choose another run=NAME")
    return config


def last_stage(run: Path) -> str | None:
    """The last enabled stage of a run whose result is a policy, by its record; None without one."""
    record = read_record(run)
    others = record.leaves if record is not None else {}
    stages = read_config(run)["stages"].items()
    trained = [name for name, stage in stages if stage.get("enabled", True) and name not in others]
    return trained[-1] if trained else None


def _summary(path: Path) -> RunSummary:
    config = read_config(path)
    stages = {n: _progress(path / n) for n, stage in config["stages"].items() if stage.get("enabled", True)}
    finished = None
    if stages and list(stages.values())[-1] == "done":
        finished = (path / list(stages)[-1] / names.DONE).stat().st_mtime
    return RunSummary(path, str(config.get("description") or ""), stages, finished)


def _progress(stage: Path) -> str:
    if (stage / names.DONE).exists():
        return "done"
    checkpoints = StageDirectory(stage).checkpoints()
    if checkpoints:
        return f"step {names.step_of(checkpoints[-1])}"
    return "begun" if stage.exists() else ""


def _of_run(run: Path) -> Path:
    name = last_stage(run)
    if name is None:
        raise ModelError(f"{run}: its recipe has no enabled stage that trains; name a checkpoint or a model")
    if (run / name / names.DONE).exists():
        return _finished(run / name)
    done = [p.parent for p in sorted(run.glob(f"*/{names.DONE}"))]
    other = f", or take {done[-1]}" if done else ""
    raise ModelError(f"{run}: stage {name} is not finished; run its `rlpost train` again to finish it{other}")


def _of_stage(stage: Path) -> Path:
    if (stage / names.DONE).exists():
        return _finished(stage)
    checkpoints = StageDirectory(stage).checkpoints()
    other = f", or take {checkpoints[-1]}" if checkpoints else ""
    raise ModelError(f"{stage}: not finished; run its `rlpost train` again to finish it{other}")


def _finished(stage: Path) -> Path:
    """The stage's result, verified to be that stage's of that run; warns about damaged logs."""
    directory = StageDirectory(stage)
    wrong = directory.wrong_result()
    if wrong:
        raise DiskError(f"{wrong}; {_REPAIR}")
    for line in directory.amiss():
        console.warn(line)
    return directory.final


def _verified(folder: Path) -> Path:
    wrong = verify(folder, _expected_about(folder))
    if wrong:
        raise DiskError(f"{folder}: {wrong}; {_REPAIR}")
    return folder


def _expected_about(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder in a run must say about it; nothing for a folder that was copied elsewhere."""
    inside = folder.resolve()
    step = names.step_of(inside)
    stage = inside.parent if step is None else inside.parent.parent
    run = run_id(stage.parent) if inside.name == names.FINAL or step is not None else None
    return {"run": run, "stage": stage.name, "step": step} if run else {}


def _may_be_on_hub(path: str) -> bool:
    """Whether it is `name` or `owner/name`, and not a path in an existing folder."""
    parts = Path(path).parts
    return bool(_HUB_NAME.fullmatch(path)) and not (len(parts) > 1 and Path(parts[0]).exists())


def _did_you_mean(folder: Path) -> str:
    """Which run, stage, checkpoint or model beside it may be meant."""
    siblings = [path.name for path in folder.parent.iterdir() if names.role(path)] if folder.parent.is_dir() else []
    near = closest(folder.name, sorted(siblings))
    return f"did you mean {folder.parent / near}?" if near else "give a run, a stage, a checkpoint or a model"
