"""Names of the files and folders of a run.

runs/NAME/             run.json, recipe.yaml, overrides.txt, config.resolved.yaml, environment.json, decisions.json,
                       base/ (a model made from scratch), evaluation/, trackers/, data.cache/ (encoded rows; may be
                       deleted), judge.sqlite (what a language model that judges has answered)
runs/NAME/STAGE/       metrics.jsonl, timings.jsonl, evaluations.jsonl, rollouts/, checkpoints/step-000500/, final/,
                       DONE
*.tmp-PID              being written; left behind only by a kill, and removed on resume
*.old.tmp-PID          what it replaces, put back on resume if the kill came between the two renames
step-000500.broken     a checkpoint that failed verification and was skipped on resume
"""

import os
import re
from pathlib import Path

from rlpost.errors import RecipeError

RECORD = "run.json"
CONFIG = "config.resolved.yaml"
RECIPE = "recipe.yaml"
OVERRIDES = "overrides.txt"
ENVIRONMENT = "environment.json"
DECISIONS = "decisions.json"
LOCK = ".lock"
HOLDER = ".pid"
BASE = "base"
EVALUATION = "evaluation"
TRACKERS = "trackers"
CACHE = "data.cache"
"""No stage can have this name."""
JUDGED = "judge.sqlite"
FOLDERS = (BASE, EVALUATION, TRACKERS)
"""Folders of a run that are no stage."""
METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
EVALUATIONS = "evaluations.jsonl"
ROLLOUTS = "rollouts"
CHECKPOINTS = "checkpoints"
FINAL = "final"
ROWS = "rows.jsonl"
DONE = "DONE"
STATE = "state.json"
ABOUT = "checkpoint.json"
FROM_HERE = "_from_here"
"""In ABOUT, after `base` or `parent`: its path relative to the checkpoint's folder, if it is in the same run."""
MANIFEST = "MANIFEST.json"
BROKEN = ".broken"

_RUN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_STAGE = re.compile(r"[A-Za-z0-9_-]{1,80}")
_STEP = re.compile(r"step-(\d{6,})(\.jsonl)?")


def step_name(step: int) -> str:
    """`step-000500` for 500."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """The step in the name `step-000500` or `step-000500.jsonl`; None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def role(folder: Path) -> str:
    """What a folder is to a command that takes a model: checkpoint, run, stage or model; empty if none of them."""
    made_by: dict[str, tuple[str, ...]] = {
        "checkpoint": (ABOUT, STATE),
        "run": (CONFIG,),
        "stage": (DONE, METRICS, CHECKPOINTS),
        "model": ("config.json", "adapter_config.json"),
    }
    return next((what for what, files in made_by.items() if any((folder / name).exists() for name in files)), "")


def unfinished(path: Path) -> Path:
    """The temporary path that is written before it is renamed to `path`."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def set_aside(path: Path) -> Path:
    """The path that `path` is renamed to while its replacement is moved in."""
    return path.with_name(f"{path.name}.old.tmp-{os.getpid()}")


def run_path(runs: Path, name: str) -> Path:
    """The directory of run `name`; raises RecipeError for a name that is malformed or leads out of `runs`."""
    if not _RUN.fullmatch(name):
        raise RecipeError(
            f"run: {name!r} is not a name of a run: use 1 to 80 of A-Z a-z 0-9 . _ - without a leading dot"
        )
    path = runs / name
    if not path.resolve().is_relative_to(runs.resolve()):
        raise RecipeError(f"run: {path} is a link out of {runs}; choose another run=NAME")
    return path


def stage_path(run: Path, name: str) -> Path:
    """The directory of a stage; raises RecipeError for a name that is malformed or leads out of the run."""
    if not _STAGE.fullmatch(name) or name in FOLDERS:
        raise RecipeError(
            f"stages.{name}: not a name of a stage: use 1 to 80 of A-Z a-z 0-9 _ -, and not {', '.join(FOLDERS)}"
        )
    path = run / name
    if not path.resolve().is_relative_to(run.resolve()):
        raise RecipeError(f"stages.{name}: {path} is a link out of {run}; remove it")
    return path
