"""The manifest of a folder: size and sha256 of every file, and a sha256 of itself.

Example: {"about": {...}, "check": "9f...", "files": {"state.json": {"sha256": "3c...", "size": 81}}}
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.errors import DiskError
from rlpost.run.names import MANIFEST


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Flush everything in the folder to disk and write its manifest, which carries `about` too."""
    paths = sorted(folder.rglob("*"))
    files = {p.relative_to(folder).as_posix(): _measure(p) for p in paths if p.is_file()}
    for path in paths:
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_bytes(_encode({"about": dict(about), "files": files}))
    sync(manifest)
    # safetensors writes its files for their owner alone, whatever the umask says.
    mode = manifest.stat().st_mode
    for name in files:
        (folder / name).chmod(mode)
    sync(folder)


def fault(folder: Path) -> str | None:
    """What is wrong with the folder by its manifest; None when every file is as it was written.

    Raises:
        DiskError: a file is there but cannot be read, so that nothing is known: no reason to pass it over.
    """
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return f"{MANIFEST} is damaged"
        for name, written in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size
            if size != written["size"]:
                return f"{name} has {size} bytes instead of {written['size']}"
            if _measure(path) != written:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        place = error.filename or folder
        raise DiskError(f"{place}: {error.strerror}; make it readable, or remove {folder}") from error
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest's content; None when it is not byte for byte what was written.

    Raises:
        OSError: it is missing or cannot be read.
    """
    data = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(data)
    except ValueError:
        return None
    if not isinstance(manifest, dict):
        return None
    manifest.pop("check", None)
    return manifest if _encode(manifest) == data else None


def _encode(manifest: dict[str, Any]) -> bytes:
    body = _canonical(manifest)
    return _canonical({**manifest, "check": hashlib.sha256(body).hexdigest()})


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": file.tell()}
