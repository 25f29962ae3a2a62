"""Resolves a recipe and its overrides into one checked configuration.

Hydra composes the files into one plain tree; overrides and references are filled in; pydantic validates the tree and
builds the sections; the rules between keys come last. Nothing heavy is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.engine.params import EngineChoice, ScoringChoice
from rlpost.errors import RecipeError
from rlpost.recipe import overrides as overriding
from rlpost.recipe import references
from rlpost.recipe.build import Build, path_of
from rlpost.recipe.compose import compose
from rlpost.recipe.files import GROUPS, Part, chain, find
from rlpost.recipe.schema import Recipe
from rlpost.recipe.validate import validate
from rlpost.section import MISSING, Local, join, marked, walk
from rlpost.strict_yaml import dump
from rlpost.suggest import asked, edits
from rlpost.trackers.params import Logging
from rlpost.usercode.binding import functions_in
from rlpost.usercode.params import Function
from rlpost.usercode.places import OF_FILE, expanded, locate, users_file
from rlpost.usercode.signatures import paths_in


@dataclass(frozen=True)
class Resolved:
    """A recipe ready to run."""

    config: Recipe
    """`stages` holds Sft, Dpo, ... in the recipe's order, disabled ones included."""
    tree: dict[str, Any]
    """The same as plain data: what is saved as config.resolved.yaml."""
    file: Path
    name: str
    """The recipe's name: its file's, without folder and ending."""
    folder: Path
    """What relative paths and `file.py:function` refer to."""
    overrides: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """One line each about what is legal but perhaps not meant."""
    missing: tuple[str, ...] = ()
    """Key paths of values that are still to be given; none but where that was allowed."""

    def to_yaml(self) -> str:
        """The configuration as a recipe that resolves to itself."""
        return dump(self.tree)

    @property
    def sha256(self) -> str:
        """Of the configuration."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def resolve(recipe: str, overrides: Sequence[str] = (), lenient: bool = False) -> Resolved:
    """Resolve a recipe given by path or packaged name, without importing torch.

    Args:
        recipe: a path, or the name of a packaged recipe.
        overrides: `key=value`, and `model=NAME` for the files of a group.
        lenient: values may still be missing; then rules between keys are not checked.

    Raises:
        RecipeError: in one line, with the full path of the key and a remedy.
    """
    try:
        return _resolve(recipe, overrides, lenient)
    except RecursionError as error:
        raise RecipeError(f"{recipe}: values refer to each other in a circle, or are nested too deeply") from error


def _resolve(recipe: str, overrides: Sequence[str], lenient: bool) -> Resolved:
    file = find(recipe)
    chosen = {key: name for key, _, name in (o.partition("=") for o in overrides) if key in GROUPS and name}
    values = [o for o in overrides if o.partition("=")[0] not in chosen]
    parts = chain(file, chosen)
    for part in parts:
        references.check(part.keys)
        _refuse_misspelt(part)
    tree = compose(parts)
    typed = overriding.apply(tree, values)
    folder = tree.get("folder")
    folders = [Path(folder) if isinstance(folder, str) else file.parent, *(part.file.parent for part in parts)]
    if tree.get("run", MISSING) == MISSING:
        tree["run"] = file.stem
    filled = references.fill(tree)
    _locate_kinds(filled.tree, [*folders, Path.cwd()])
    built = Build(filled, typed, lenient)
    config = built.recipe
    config.folder = str(expanded(config.folder, "folder")) if config.folder else str(file.parent)
    config.runs = str(expanded(config.runs, "runs"))
    _make_absolute(config, [Path(config.folder), *(part.file.parent for part in parts), Path.cwd()])
    warnings = [] if built.missing else validate(config)
    missing = tuple(map(path_of, built.missing))
    # Values may be missing, and serializing warns of their type.
    plain = references.escaped(config.model_dump(mode="json", warnings=False))
    return Resolved(config, plain, file, file.stem, Path(config.folder), tuple(overrides), tuple(warnings), missing)


def _refuse_misspelt(part: Part) -> None:
    """Refuse a misspelt key at the top of a file at once: without `defaults` or `vars`, everything else looks wrong."""
    if "hydra" in part.keys:  # Hydra would take it as its own and not hand it back
        raise RecipeError(f"{part.file}: hydra: unknown key - hydra's own settings are refused")
    for key in part.keys:
        meant = [name for name in ("defaults", *Recipe.model_fields) if edits(key[:20], name) == 1]
        if meant and key not in Recipe.model_fields:
            raise RecipeError(f"{key}: unknown key{asked(meant)}")


def _locate_kinds(tree: dict[str, Any], folders: Sequence[Path]) -> None:
    """Give the stages of a user's own kind (`kind: file.py:function`) their file's absolute path."""
    stages = tree.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        kind = stage.get("kind") if isinstance(stage, dict) else None
        if isinstance(kind, str) and OF_FILE.fullmatch(kind):
            stage["kind"] = locate(kind, f"stages.{name}.kind", folders)
            users_file(stage["kind"], f"stages.{name}.kind", folders[0])


def _make_absolute(config: Recipe, folders: list[Path]) -> None:
    """Make the paths of local files absolute, so that the resolved recipe can be run from any folder."""
    for where, section in walk(config):
        if isinstance(section, Function):
            section.fn = locate(section.fn, join(where, "fn"), folders)
        if isinstance(section, EngineChoice | ScoringChoice):
            section.engine = locate(section.engine, join(where, "engine"), folders)
        if isinstance(section, Logging):
            section.to = [locate(to, join(join(where, "to"), i), folders) for i, to in enumerate(section.to)]
        for key, info in type(section).model_fields.items():
            given = getattr(section, key)
            if marked(info, Local) and given and given != MISSING and given not in config.stages:
                setattr(section, key, _absolute(given, join(where, key), folders))
    for function, lookup, where in functions_in(config, ""):
        for name in paths_in(function, lookup):
            function.args[name] = _absolute(function.args[name], f"{where}.args.{name}", folders)


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
