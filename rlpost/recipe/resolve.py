"""A recipe and its overrides -> one typed, checked configuration.

Hydra composes the recipe and those it inherits from into one plain tree, which names the stages and their
kinds. With these the schema is complete: keys and overrides are checked, and the tree is merged onto it.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from rlpost.engine.params import EngineChoice
from rlpost.errors import RecipeError
from rlpost.recipe import overrides as overriding
from rlpost.recipe.files import Part, chain, expanded, find
from rlpost.recipe.keys import FALSE, MISSING, Keys, join
from rlpost.recipe.places import locate, locate_kinds
from rlpost.recipe.references import references, refuse_excess, refuse_resolvers
from rlpost.recipe.schema import Recipe
from rlpost.recipe.typed import build, filled, plain
from rlpost.recipe.validate import validate
from rlpost.recipe.walk import walk
from rlpost.suggest import hint
from rlpost.usercode.params import Function

_LOCK = threading.RLock()  # Hydra's state and its config store are global to the process


@dataclass(frozen=True)
class Resolved:
    """A recipe ready to run."""

    config: Recipe
    """As dataclasses; `stages` holds Sft, Dpo, ... in the recipe's order, disabled ones included."""
    node: DictConfig
    """The same as OmegaConf, read-only: what is saved as config.resolved.yaml."""
    file: Path
    name: str
    """The recipe's name: its file's, without folder and ending."""
    folder: Path
    """What relative paths and `file.py:function` refer to."""
    overrides: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Lines for the user: legal, but perhaps not meant."""

    def to_yaml(self) -> str:
        """The configuration as a recipe that resolves to itself."""
        return OmegaConf.to_yaml(self.node)


def resolve(recipe: str, overrides: Sequence[str] = ()) -> Resolved:
    """Resolve a recipe given by path or packaged name, without importing torch.

    Raises:
        RecipeError: in one line, with the full path of the key and a remedy.
    """
    file = find(recipe)
    parts = chain(file)
    for part in parts:
        refuse_resolvers(part.keys)
        if "hydra" in part.keys:  # Hydra would take it as its own and not hand it back
            raise RecipeError(f"{part.file}: hydra: unknown key - hydra's own settings are refused")
    tree: dict[str, Any] = {}
    try:
        tree = _compose(parts)
        folder = tree.get("folder")
        folders = [Path(folder) if isinstance(folder, str) else file.parent, *(part.file.parent for part in parts)]
        locate_kinds(tree, [*folders, Path.cwd()])
        Keys(tree).check()
        overriding.apply(tree, overrides, [*folders, Path.cwd()])
        refuse_resolvers(tree)
        tree["run"] = tree.get("run", MISSING) if tree.get("run", MISSING) != MISSING else file.stem
        config = _typed(tree)
    except OmegaConfBaseException as error:
        raise RecipeError(_explain(error, tree)) from error
    except HydraException as error:
        raise RecipeError(f"{file}: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise RecipeError(f"{recipe}: values refer to each other in a circle, or are nested too deeply") from error
    config.folder = str(expanded(config.folder, "folder")) if config.folder else str(file.parent)
    config.runs = str(expanded(config.runs, "runs"))
    _make_absolute(config, [Path(config.folder), *(part.file.parent for part in parts), Path.cwd()])
    warnings = validate(config, left_out=frozenset(tree.get("stages") or {}) - set(config.stages))
    node = OmegaConf.create(plain(config))
    OmegaConf.set_readonly(node, True)
    return Resolved(config, node, file, file.stem, Path(config.folder), tuple(overrides), tuple(warnings))


def _compose(parts: list[Part]) -> dict[str, Any]:
    """The parts merged by Hydra: mappings merge, lists replace; nothing is filled in yet."""
    if len(parts) == 1:  # nothing to merge, and Hydra takes a third of the time a resolved recipe takes
        return deepcopy(parts[0].keys)
    with _LOCK:
        store = ConfigStore.instance()
        key = f"_rlpost_{uuid.uuid4().hex}"
        names = [f"{key}_{i}" for i in range(len(parts))]
        try:
            for name, part in zip(names, parts, strict=True):
                store.store(name=name, node=part.keys)
            store.store(name=key, node={"defaults": [*names, "_self_"]})
            with initialize(config_path=None, version_base="1.3"):
                composed = compose(key)
        finally:
            for name in (key, *names):
                store.repo.pop(f"{name}.yaml", None)
    return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))


def _typed(tree: dict[str, Any]) -> Recipe:
    """The tree on the schema with its own stages, every reference filled in."""
    # OmegaConf follows the references in a plain tree: it cannot merge one onto an optional dataclass, names
    # errors inside lists by half a path, and its structured nodes would take twice the time of all the rest.
    whole = filled(Keys(tree))
    refuse_excess(whole)
    node = OmegaConf.create(whole)
    unneeded = _leave_out_unfinished(node)
    _refuse_missing(node, unneeded)
    for key in unneeded:
        OmegaConf.update(node, key, None)
    OmegaConf.resolve(node)
    keys = Keys(cast(dict[str, Any], OmegaConf.to_container(node)))
    keys.check()
    keys = Keys(filled(keys))  # once more, for what the references brought in
    _refuse_missing(OmegaConf.create(keys.tree), set())
    return build(keys)


def _leave_out_unfinished(node: DictConfig) -> set[str]:
    """Drop disabled stages with values still to be given; returns the variables which only they may need."""
    text = ""
    for name in list(node.stages):
        stage = node.stages[name]
        if str(stage.enabled).lower() not in FALSE:
            continue
        try:
            OmegaConf.to_container(stage, resolve=True, throw_on_missing=True)
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            text += OmegaConf.to_yaml(stage)
            del node.stages[name]
    needed = OmegaConf.to_yaml(node)
    return {
        f"vars.{name}"
        for name in node.vars
        if OmegaConf.is_missing(node.vars, name) and f"${{vars.{name}" in text and f"${{vars.{name}" not in needed
    }


def _refuse_missing(node: DictConfig, unneeded: set[str]) -> None:
    missing = [key for key in _missing(OmegaConf.to_container(node), "") if key not in unneeded]
    if missing:
        raise RecipeError("; ".join(_ask(key, node) for key in missing))


def _missing(value: Any, where: str) -> Iterator[str]:
    if value == MISSING:
        yield where
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _missing(inner, join(where, key))


def _ask(key: str, node: DictConfig) -> str:
    """How to give a missing value; a variable that stands for a path says so."""
    if not key.startswith("vars."):
        return f"{key}: missing - give it in the recipe or as `{key}=VALUE`"
    used_as_path = re.search(rf"path: ['\"]?\$\{{{re.escape(key)}\}}", OmegaConf.to_yaml(node))
    return f"{key}: give it as `{key}={'PATH' if used_as_path else 'VALUE'}`"


def _make_absolute(config: Recipe, folders: list[Path]) -> None:
    """Local files of a recipe are the same from wherever its resolved form is run."""
    for where, value in walk(config):
        if isinstance(value, Function):
            value.fn = locate(value.fn, join(where, "fn"), folders)
        if isinstance(value, EngineChoice):
            value.engine = locate(value.engine, join(where, "engine"), folders)
        for name in (f.name for f in fields(value) if f.metadata.get("path")):
            given = getattr(value, name)
            if given and given not in config.stages:
                setattr(value, name, _absolute(given, join(where, name), folders))


def _absolute(given: str, where: str, folders: list[Path]) -> str:
    path = expanded(given, where)
    try:
        found = list(dict.fromkeys(place.resolve() for folder in folders if (place := folder / path).exists()))
    except OSError as error:
        raise RecipeError(f"{where}: {given}: {error.strerror} - give another path") from error
    if len(found) > 1:
        raise RecipeError(f"{where}: {given!r} is {found[0]} or {found[1]} - give the absolute path")
    # A path found nowhere stays as it is: it may be a name on the hub. One below the home folder cannot be that.
    return str(found[0]) if found else str(path) if given.startswith("~") else given


def _explain(error: OmegaConfBaseException, tree: dict[str, Any]) -> str:
    """OmegaConf's error in one line; keys and types were checked before, so it is about a reference."""
    message = (str(error.msg or error).splitlines() or [""])[0]
    match = re.search(r"Interpolation key '(.*?)' not found", message)
    if not match:
        return f"{error.full_key or 'recipe'}: {message}"
    where = next((key for key, text in references(tree) if f"${{{match[1]}}}" in text), "recipe")
    return f"{where}: nothing is called {match[1]!r} in the recipe{hint(match[1], Keys(tree).paths())}"
