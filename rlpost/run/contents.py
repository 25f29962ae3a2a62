"""The contents of a model's folder by file, size and sha256, to tell when they change.

Example: {"path": "/models/tiny", "files": {"config.json": {"sha256": "3c...", "size": 81, "inode": 7, "mtime_ns": 1}}}

A folder with a manifest is described by it; whoever uses the folder has verified it. Other folders are read once: a
file with unchanged size, inode and modification time is not read again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.run.files import disk_errors
from rlpost.run.manifest import is_loaded, measure, read_manifest
from rlpost.run.names import ABOUT, MANIFEST

Contents = dict[str, Any]


def contents(folder: Path, known: Mapping[str, Any] | None = None) -> Contents:
    """Size and sha256 of every file in the folder that loading it reads.

    Args:
        folder: a model, an adapter, or rows.
        known: an earlier result; files not modified since are not read again.

    Raises:
        DiskError: a file cannot be read.
    """
    with disk_errors(folder):
        if (folder / MANIFEST).is_file() and (manifest := read_manifest(folder)) is not None:
            # ABOUT may differ, since it only says where the model came from.
            files = {name: dict(of) for name, of in manifest["files"].items() if name != ABOUT}
        else:
            before = (known or {}).get("files", {})
            files = {p.name: _file(p, before.get(p.name)) for p in sorted(folder.iterdir()) if _counts(p)}
    return {"path": str(folder), "files": files}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first file that differs, and how; None if none does, or the files of one side are not known."""
    old, new = before.get("files", {}), now.get("files", {})
    if not old or not new:
        return None
    for name in sorted({*old, *new}):
        if name not in new:
            return f"{name} is missing"
        if name not in old:
            return f"{name} is new"
        if old[name]["sha256"] != new[name]["sha256"]:
            return f"{name} has changed"
    return difference(before.get("base") or {}, now.get("base") or {})


def _counts(path: Path) -> bool:
    return path.is_file() and is_loaded(path.name) and path.suffix != ".bin" and path.name != ABOUT


def _file(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    stat = path.stat()
    current = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    if known is not None and all(known.get(key) == value for key, value in current.items()):
        return dict(known)
    return {**measure(path), **current}
