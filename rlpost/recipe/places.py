"""Where the files of `file.py:function` lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import RecipeError
from rlpost.recipe.files import expanded, packaged_folder

OF_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[^:]*)")


def locate(fn: str, where: str, folders: Sequence[Path]) -> str:
    """`file.py:function` with the file's absolute path; other names as they are.

    Raises:
        RecipeError: none of the folders has the file.
    """
    match = OF_FILE.fullmatch(fn)
    if not match:
        return fn
    given = expanded(match["file"], where)
    try:
        found = next((place for folder in folders if (place := folder / given).is_file()), None)
    except OSError as error:
        raise RecipeError(f"{where}: {given}: {error.strerror} - give another path") from error
    if found is not None:
        return f"{found.resolve()}:{match['name']}"
    raise RecipeError(f"{where}: no file {match['file']!r} in {_either(folders[0], folders[-1])}")


def _either(one: Path, other: Path) -> str:
    return str(one) if one.resolve() == other.resolve() else f"{one} or {other}"


def users_file(fn: str, where: str, base: Path) -> Path | None:
    """The file of `file.py:function`; None for a function of rlpost.

    Raises:
        RecipeError: it is not there, or lies outside the recipe's folder `base` and the working directory.
    """
    match = OF_FILE.fullmatch(fn)
    if match is None:
        return None
    file, folders = Path(match["file"]), [base.resolve(), Path.cwd().resolve()]
    places = [folder / file for folder in folders]
    path = next((place for place in places if place.is_file()), places[0]).resolve()
    if not any(path.is_relative_to(folder) for folder in (*folders, packaged_folder().resolve())):
        raise RecipeError(f"{where}: {file} lies outside the recipe's folder and the working directory - move it")
    if not path.is_file():
        raise RecipeError(f"{where}: no file {str(file)!r} in {_either(base, Path.cwd())}")
    return path


def locate_kinds(tree: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """Give the stages of a user's own kind (`kind: file.py:function`) their file's absolute path.

    Raises:
        RecipeError: it is not there, or lies outside the recipe's folder, the first, and the working directory.
    """
    stages = tree.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        kind = stage.get("kind") if isinstance(stage, dict) else None
        if isinstance(kind, str) and OF_FILE.fullmatch(kind):
            stage["kind"] = locate(kind, f"stages.{name}.kind", folders)
            users_file(stage["kind"], f"stages.{name}.kind", folders[0])
