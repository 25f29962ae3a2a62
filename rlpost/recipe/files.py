"""Recipe files: where they are, what may stand in them, and which they inherit from."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlpost.errors import RecipeError
from rlpost.suggest import closest, hint_or_list

MAX_BYTES = 256_000
MAX_FILES = 50
"""Files one recipe may inherit from; two lines that name each file twice would double the work per level."""


def packaged_folder() -> Path:
    """The folder of packaged recipes: inside the wheel, or beside the package in a checkout."""
    inside = Path(str(files("rlpost"))) / "recipes"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True)
class Part:
    """One file of a recipe's chain of inheritance."""

    file: Path
    keys: dict[str, Any]
    """Its contents without `defaults`."""


@dataclass(frozen=True)
class Listed:
    """A packaged recipe as `rlpost list` shows it."""

    name: str
    description: str


def packaged() -> list[str]:
    """Names of the packaged recipes, those in subfolders as `folder/name`."""
    folder = packaged_folder()
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def listing() -> list[Listed]:
    """The packaged recipes with their descriptions."""
    return [Listed(name, describe(packaged_folder() / f"{name}.yaml")) for name in packaged()]


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
            what = "not a file" if path.exists() else "no such file"
            raise RecipeError(f"{recipe}: {what}{_near(recipe)}")
        return path.resolve()
    if recipe not in packaged():
        raise RecipeError(f"{recipe}: no packaged recipe of that name{_near(recipe)}")
    return (packaged_folder() / f"{recipe}.yaml").resolve()


def expanded(path: str, where: str) -> Path:
    """The path with `~` and `~user` as the home folder; `where` it is given, for errors.

    Raises:
        RecipeError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = path.split("/")[0]
        raise RecipeError(f"{where}: {user} is nobody's home folder here - write the path in full") from error


def _near(recipe: str) -> str:
    """Which recipe may be meant: a file beside it, or a packaged one (methods/rloo by `rloo`); or where to look."""
    path = Path(recipe)
    beside = {str(p): p for ending in ("yaml", "yml") for p in sorted(path.parent.glob(f"*.{ending}"))}
    own = next((name for name, p in beside.items() if p.stem == path.name), None) or (
        closest(recipe, beside) if path.suffix else None
    )
    names, stem = packaged(), recipe.removesuffix(".yaml").removesuffix(".yml")
    by_last = {name.rpartition("/")[2]: name for name in names}
    last = stem.rpartition("/")[2]
    near = own or by_last.get(last) or closest(stem, names) or by_last.get(closest(last, by_last) or "")
    return f" - did you mean {near!r}?" if near else " - `rlpost list` shows them all; a file's name ends in .yaml"


def chain(file: Path) -> list[Part]:
    """The file and all it inherits from by `defaults`, in the order in which later ones win.

    Raises:
        RecipeError: a file is missing, malformed or inherits from itself.
    """
    return _follow(file, ())


def _follow(file: Path, above: tuple[Path, ...]) -> list[Part]:
    keys = read(file)
    entries = _defaults(file, keys.pop("defaults", None))
    above = (*above, file)
    parts: list[Part] = []
    for entry in entries:
        parts += [Part(file, keys)] if entry == "_self_" else _follow(_parent(entry, file, above), above)
        if len(parts) > MAX_FILES:
            raise RecipeError(f"{file}: defaults: more than {MAX_FILES} files - inherit from fewer")
    return parts


def _defaults(file: Path, entries: object) -> list[str]:
    if entries is None:
        return ["_self_"]
    if not isinstance(entries, list):
        raise RecipeError(f"{file}: defaults: expected a list like [other_recipe, _self_]")
    for entry in entries:
        if not isinstance(entry, str):
            raise RecipeError(f"{file}: defaults: expected names of recipes, got {entry!r}")
        if ".." in entry or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._/-]*", entry):
            raise RecipeError(
                f"{file}: defaults: {entry!r} is refused - name a recipe of the same folder or a packaged one"
            )
    return entries if "_self_" in entries else [*entries, "_self_"]


def _parent(entry: str, file: Path, above: tuple[Path, ...]) -> Path:
    """The file `entry` names; a recipe may extend the packaged recipe of its own name."""
    name = entry.removesuffix(".yaml")
    places = [(folder / f"{name}.yaml").resolve() for folder in (file.parent, packaged_folder())]
    found = [place for place in places if place.is_file()]
    if not found:
        names = {p.stem for p in file.parent.glob("*.yaml")} | set(packaged())
        raise RecipeError(f"{file}: defaults: no recipe {entry!r}{hint_or_list(name, sorted(names), 'there are')}")
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
        tree = yaml.load(data.decode("utf-8-sig"), Loader=_Loader)  # a SafeLoader: makes plain data only
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read - {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start} - save it as UTF-8") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: nested too deeply - flatten it") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        quote = " - inside braces write '???' in quotes" if "found '?'" in (error.problem or "") else ""
        raise RecipeError(f"{file}{line}: {error.problem or error.context}{quote}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{file}: not YAML - {_one_line(error)}") from error
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{file}: expected keys and values, got {type(tree).__name__}")
    return tree or {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """YAML without its traps: no aliases, no duplicate keys, no octal numbers, dates or clock times."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are refused - use vars and ${vars.name}",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = ""
            if key.value == "<<" or not isinstance(key, yaml.ScalarNode):
                problem = "keys are plain names"
            elif key.tag == "tag:yaml.org,2002:null":
                problem = f"{key.value or 'nothing'} is no key - put a name in quotes"
            elif key.value in seen:
                problem = f"key {key.value!r} stands here twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_PLAIN = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
