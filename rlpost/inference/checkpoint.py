"""Finds a checkpoint to use: its model, the recipe of its run, and the models of that recipe's rewards."""

from __future__ import annotations

from pathlib import Path

import torch

from rlpost import ranks
from rlpost.agreement import must_agree
from rlpost.errors import RecipeError
from rlpost.policy.load import decide_bfloat16, load_policy, width_of
from rlpost.policy.params import Attention, Model, Precision
from rlpost.policy.policy import Policy
from rlpost.recipe.resolve import Resolved
from rlpost.recipe.rules import JUDGES
from rlpost.run.environment import versions
from rlpost.run.lookup import find_checkpoint, read_config
from rlpost.run.names import CONFIG
from rlpost.run.stage import StageDirectory


def join_ranks(resolved: Resolved, model: str) -> None:
    """Join the other processes of a command, where a launcher started several: they share its work.

    Raises:
        RecipeError: they are about to do different things, or there are fewer devices than processes.
    """
    ranks.start()
    must_agree({"a recipe of sha256": resolved.sha256, "a model": model, **versions()})


def located(name: str) -> str:
    """The folder of the checkpoint that a run, stage or checkpoint names; else the name, which is a model's."""
    return str(find_checkpoint(name) or name)


def frozen_policy(path: str, model: Model | None = None, backwards: bool = False) -> Policy:
    """A model to sample from, on the GPU if there is one.

    Args:
        path: its folder, or its name on the Hub.
        model: the settings to load it with; by default as its run loads it.
        backwards: it must be a model of reversed text; otherwise it must be none.

    Raises:
        ModelError: it cannot be loaded, or reads the other way.
    """
    model = model or _as_in_its_run(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = decide_bfloat16(model.precision, device, width_of(path, model.revision))
    return load_policy(path, model, bfloat16=half, device=device, trainable=False, backwards=backwards)


def _as_in_its_run(path: str) -> Model:
    """Precision, layout and kernels as the recipe of the checkpoint's run says; outside of runs the defaults."""
    folder = Path(path).resolve()
    run = next((parent for parent in folder.parents if (parent / CONFIG).is_file()), None) if folder.is_dir() else None
    section = {} if run is None else read_config(run).get("model") or {}
    precision, attention = Precision(section.get("precision", "auto")), Attention(section.get("attention", "auto"))
    return Model(precision=precision, attention=attention, fast=section.get("fast", True))


def recipe_of(path: str) -> Path:
    """The resolved recipe of the run that contains a path.

    Raises:
        RecipeError: no run does.
    """
    folder = Path(path).resolve()
    for parent in (folder, *folder.parents):
        if (parent / CONFIG).is_file():
            return parent / CONFIG
    what = "not part of a run" if folder.exists() else "not here"
    raise RecipeError(f"{path}: {what}, so its recipe is not known; name one with --recipe")


def judges_of(resolved: Resolved, path: str | None) -> dict[str, Path]:
    """The finished reward models of the recipe's run, or of the run that contains `path`, by stage."""
    run = Path(resolved.config.runs) / resolved.config.run if path is None else recipe_of(path).parent
    stages = resolved.config.stages.items()
    found = {n: StageDirectory(run / n).done for n, s in stages if s.leaves in JUDGES}
    return {name: folder for name, folder in found.items() if folder is not None}
