"""Where the files of `file.py:function` lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from rlpost.errors import RecipeError
from rlpost.suggest import hint

OF_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[^:]*)")


def packaged_folder() -> Path:
    """The folder of packaged recipes: inside the wheel, or beside the package in a checkout."""
    inside = Path(str(files("rlpost"))) / "recipes"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


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
    beside = [str(given.with_name(p.name)) for folder in folders for p in (folder / given).parent.glob("*.py")]
    near = hint(match["file"], beside)
    raise RecipeError(f"{where}: no file {match['file']!r} in {_either(folders[0], folders[-1])}{near}")


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
