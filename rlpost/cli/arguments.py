"""Parse paths and COLUMN=TEXT pairs of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlpost.errors import DiskError, RecipeError
from rlpost.usercode.places import expanded

_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")


def home(path: str | None) -> str | None:
    """The path with `~` expanded: shells do not expand it in `--out=~/x`.

    Raises:
        RecipeError: there is no user `name` for `~name`.
    """
    return str(expanded(path, path)) if path is not None and path.startswith("~") else path


def target(path: str | None) -> str | None:
    """The path of a file to write, checked before the work starts.

    Raises:
        DiskError: it is a folder, or its folder is missing.
    """
    path = home(path)
    if path is None:
        return None
    file = Path(path)
    if not path or file.is_dir():
        raise DiskError(f"--out: {path!r} is a folder; give a file in it")
    if not file.parent.is_dir():
        raise DiskError(f"--out: {path}: there is no folder {file.parent}; make it, or write elsewhere")
    return path


def picture(path: str | None) -> str | None:
    """The path of a picture to write.

    Raises:
        DiskError: it is a folder, or its folder is missing.
        RecipeError: its suffix is not one of a picture.
    """
    path = target(path)
    if path is not None and Path(path).suffix not in _PICTURES:
        raise RecipeError(f"--out: {path} - end it in one of {', '.join(_PICTURES)}")
    return path


def columns(given: Sequence[str], option: str) -> dict[str, str]:
    """The row that `COLUMN=TEXT` words give.

    Raises:
        RecipeError: a word has no `=`, or no column before it.
    """
    row = {}
    for word in given:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise RecipeError(f"{option}: {word} - write COLUMN=TEXT, like answer=580")
        row[name] = text
    return row
