"""Finds and reads recipe files, and follows what they inherit from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlpost.errors import RecipeError
from rlpost.strict_yaml import Loader
from rlpost.suggest import asked, hint_or_list, nearest, shortened
from rlpost.usercode.places import expanded, packaged_folder

MAX_BYTES = 256_000
MAX_DEPTH = 100
"""Mappings and lists in one another, at most: what reads and writes them goes down as far."""
MAX_FILES = 50
"""Most files that one recipe may inherit from: naming each file twice would double the work with every level."""
SHARED = "(shared"
"""The description of a recipe that only others inherit from begins with this."""
_KINDS: dict[type, str] = {list: "a list", str: "text"}
GROUPS = ("model", "logging")
"""Sections that may be chosen by name: `model: smollm2` is the file model/smollm2.yaml."""


@dataclass(frozen=True)
class Part:
    """One file of a recipe's chain of inheritance."""

    file: Path
    keys: dict[str, Any]
    """Its contents without `defaults`."""
    group: str | None = None
    """For a group's file, the section that it replaces."""


@dataclass(frozen=True)
class Listed:
    """A packaged recipe as `rlpost list` shows it."""

    name: str
    description: str


def packaged() -> list[str]:
    """Names of the packaged recipes, those in subfolders as `folder/name`."""
    folder = packaged_folder()
    names = (p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
    return sorted(name for name in names if name.partition("/")[0] not in GROUPS)


def choices(group: str, beside: Path) -> dict[str, Path]:
    """The files of a group by name: those in the folder `beside` the recipe, and the packaged ones."""
    folders = (packaged_folder() / group, beside / group)
    return {file.stem: file.resolve() for folder in folders for file in sorted(folder.glob("*.yaml"))}


def listing() -> list[Listed]:
    """The packaged recipes with their descriptions."""
    return [Listed(name, describe(packaged_folder() / f"{name}.yaml")) for name in packaged()]


def runnable() -> list[Listed]:
    """The packaged recipes that can be run: not those that others only inherit from."""
    return [recipe for recipe in listing() if not recipe.description.startswith(SHARED)]


def describe(file: Path) -> str:
    """A recipe's `description`, or its first comment."""
    comment = ""
    for line in file.read_text("utf-8").splitlines():
        if match := re.match(r"description:\s*(.+)", line):
            return match[1].strip().strip("\"'")
        if not comment and line.startswith("#"):
            comment = line.lstrip("# ").strip()
    return comment


def find(recipe: str) -> Path:
    """The file of a recipe given by path or packaged name.

    Raises:
        RecipeError: there is none.
    """
    if not recipe.strip():
        raise RecipeError("RECIPE: empty - give a .yaml file or the name of a packaged recipe (`rlpost list`)")
    path = expanded(recipe, recipe)
    if path.suffix in (".yaml", ".yml"):
        try:
            found = path.is_file()
        except OSError as error:
            raise RecipeError(f"{recipe}: {error.strerror} - give the path of a recipe") from error
        if not found:
            if path.is_dir():
                raise RecipeError(f"{recipe}: not a file but a folder - give the path of a recipe in it")
            what = "not a file" if path.exists() else "no such file"
            raise RecipeError(f"{recipe}: {what}{_near(recipe)}")
        return path.resolve()
    if recipe not in packaged():
        from rlpost.run.names import CONFIG  # only here: a recipe that is found is quick

        with suppress(OSError):  # a name that is too long for a file
            if (path / CONFIG).is_file():
                raise RecipeError(f"{recipe}: a run, not a recipe - its recipe is {Path(recipe) / CONFIG}")
        raise RecipeError(f"{recipe}: no packaged recipe of that name{_near(recipe)}")
    return (packaged_folder() / f"{recipe}.yaml").resolve()


def _near(recipe: str) -> str:
    """Suggest a recipe: a file beside it, or a packaged one (`methods/rloo` for `rloo`); else say how to list them."""
    path = Path(recipe)
    beside = [p for ending in ("yaml", "yml") for p in sorted(path.parent.glob(f"*.{ending}")) if p.is_file()]
    own = [str(p) for p in beside if p.stem == path.name]
    if path.suffix and not own:
        own = nearest(recipe, map(str, beside))
    stem = recipe.removesuffix(".yaml").removesuffix(".yml")
    last = stem.rpartition("/")[2]
    by_last = {listed.name.rpartition("/")[2]: listed.name for listed in runnable()}
    names = by_last | {name: name for name in by_last.values()}
    meant = own or ([last] if last in by_last else nearest(stem, names) or nearest(last, by_last))
    near = list(dict.fromkeys(names.get(name, name) for name in meant))
    return asked(near) or " - `rlpost list` shows them all; a file's name ends in .yaml"


def chain(file: Path, chosen: Mapping[str, str] | None = None) -> list[Part]:
    """The file and all it inherits from by `defaults`, in the order in which later ones win.

    Args:
        file: of a recipe.
        chosen: names of groups' files that replace the recipe's own sections.

    Raises:
        RecipeError: a file is missing, malformed or inherits from itself.
    """
    parts = _follow(file, ())
    return parts + [_chosen(group, name, file.parent, group) for group, name in (chosen or {}).items()]


def _follow(file: Path, above: tuple[Path, ...]) -> list[Part]:
    keys = read(file)
    entries = _defaults(file, keys.pop("defaults", None))
    above = (*above, file)
    parts: list[Part] = []
    for entry in entries:
        if isinstance(entry, dict):
            parts += [_chosen(group, name, file.parent, f"{file}: defaults") for group, name in entry.items()]
        else:
            parts += [Part(file, keys)] if entry == "_self_" else _follow(_parent(entry, file, above), above)
        if len(parts) > MAX_FILES:
            raise RecipeError(f"{file}: defaults: more than {MAX_FILES} files - inherit from fewer")
    return parts


def _chosen(group: str, name: str, folder: Path, where: str) -> Part:
    """The part that a group's file makes."""
    found = choices(group, folder)
    if name not in found:
        raise RecipeError(f"{where}: no {group} {shortened(repr(name))}{hint_or_list(name, found, 'there are')}")
    return Part(found[name], {group: read(found[name])}, group)


def _defaults(file: Path, entries: object) -> list[str | dict[str, str]]:
    if entries is None:
        return ["_self_"]
    if not isinstance(entries, list):
        raise RecipeError(f"{file}: defaults: expected a list like [other_recipe, {{model: smollm2}}, _self_]")
    for entry in entries:
        if isinstance(entry, dict):
            for group, name in entry.items():
                if group not in GROUPS or not isinstance(name, str):
                    near = hint_or_list(str(group), GROUPS, "groups")
                    raise RecipeError(
                        f"{file}: defaults: {shortened(repr(entry))} chooses nothing - write {{model: NAME}}{near}"
                    )
            continue
        if not isinstance(entry, str):
            raise RecipeError(f"{file}: defaults: expected names of recipes, got {shortened(repr(entry))}")
        if ".." in entry or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._/-]{0,199}", entry):
            shown = shortened(repr(entry))
            raise RecipeError(
                f"{file}: defaults: {shown} is refused - name a recipe of the same folder or a packaged one"
            )
    return entries if "_self_" in entries else [*entries, "_self_"]


def _parent(entry: str, file: Path, above: tuple[Path, ...]) -> Path:
    """The file that `entry` names; a recipe may extend the packaged recipe of the same name."""
    name = entry.removesuffix(".yaml")
    places = [(folder / f"{name}.yaml").resolve() for folder in (file.parent, packaged_folder())]
    found = [place for place in places if place.is_file()]
    if not found:
        names = {p.stem for p in file.parent.glob("*.yaml")} | set(packaged())
        raise RecipeError(
            f"{file}: defaults: no recipe {shortened(repr(entry))}{hint_or_list(name, sorted(names), 'there are')}"
        )
    for place in found:
        if place not in above:
            return place
    raise RecipeError(f"{file}: defaults: {entry!r} inherits from itself - remove one of the two")


def read(file: Path) -> dict[str, Any]:
    """A recipe file as a mapping, nothing resolved yet.

    Raises:
        RecipeError: it is too large, not YAML, or uses aliases or duplicate keys.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{file}: larger than {MAX_BYTES // 1000} kB - put data into a file of its own")
        tree = yaml.load(data.decode("utf-8-sig"), Loader=Loader)  # a SafeLoader: makes plain data only
        if _is_deeper(tree, MAX_DEPTH):
            raise RecursionError
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read - {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start} - save it as UTF-8") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: nested too deeply - flatten it") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{file}{line}: {error.problem or error.context}{_remedy(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{file}: not YAML - {_one_line(error)}") from error
    if not isinstance(tree, dict | None):
        raise RecipeError(
            f"{file}: expected keys and values, like `model: {{path: gpt2}}`, got {_KINDS.get(type(tree), 'a value')}"
        )
    return tree or {}


def _is_deeper(tree: Any, depth: int) -> bool:
    """Whether mappings and lists lie more than `depth` deep in one another."""
    inside = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return bool(inside) and (not depth or any(_is_deeper(x, depth - 1) for x in inside))


def _remedy(error: yaml.MarkedYAMLError) -> str:
    """How to mend a YAML error."""
    problem, context = error.problem or "", error.context or ""
    opened = f"line {error.context_mark.line + 1}" if error.context_mark else "a line before"
    if "found '?'" in problem:
        return " - inside braces write '???' in quotes"
    if "'\\t'" in problem:
        return " - indent with spaces"
    if context.startswith("while parsing a flow"):
        return f" - the bracket opened in {opened} is not closed, or a comma is missing"
    if context.startswith("while scanning a quoted"):
        return f" - the quote opened in {opened} is not closed"
    if problem.startswith("mapping values are not allowed"):
        return " - put a value with a colon in quotes, and indent a key as those around it"
    return " - indent keys of one section alike" if "<block end>" in problem else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
