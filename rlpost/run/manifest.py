"""The manifest of a folder: size and sha256 of every file that carries state, and a sha256 of itself.

Example: {"about": {...}, "check": "9f...", "files": {"state.json": {"sha256": "3c...", "size": 81}}}

Files that libraries read are part of it; notes that people add or edit (README.md, .gitattributes) are not.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rlpost.errors import DiskError
from rlpost.run.names import MANIFEST
from rlpost.run.sealed import seal, unseal

_NOTES = {".md", ".rst", ".png", ".jpg", ".svg", ".html", ".pdf"}
_LOADED = {".safetensors", ".bin", ".jinja", ".model", ".tiktoken"}
_LOADED_NAMES = {
    *("config.json", "generation_config.json", "adapter_config.json", "checkpoint.json", "value.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "preprocessor_config.json", "processor_config.json"),
}


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
    named = {p.relative_to(folder).as_posix(): p for p in paths if p.is_file() and p.name != MANIFEST}
    files = {name: measure(path) for name, path in named.items() if not is_note(name)}
    for path in paths:
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_bytes(seal({"about": dict(about), "files": files}))
    sync(manifest)
    # safetensors makes its files readable by their owner alone, whatever the umask.
    mode = manifest.stat().st_mode
    for name in files:
        (folder / name).chmod(mode)
    sync(folder)


def verify(folder: Path, about: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with the folder by its manifest; None if every file is as it was written and there are no others.

    Args:
        folder: the folder with the manifest.
        about: what its manifest must say about it; None values are not compared.

    Raises:
        DiskError: a file is there but cannot be read.
    """
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return f"{MANIFEST} is damaged"
        for name, written in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != written["size"]:
                return f"{name} has {size} bytes instead of {written['size']}"
            if measure(folder / name) != written:
                return f"{name} has changed since it was written"
        return _stranger(folder, manifest, about or {})
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        location = error.filename or folder
        raise DiskError(f"{location}: {error.strerror}; make it readable, or remove {folder}") from error


def stranger(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Why the folder, or a file in it, belongs elsewhere; None if it does not, or is damaged."""
    try:
        manifest = read_manifest(folder)
    except OSError:
        return None
    return _stranger(folder, manifest, about) if manifest is not None else None


def _stranger(folder: Path, manifest: Mapping[str, Any], about: Mapping[str, Any]) -> str | None:
    found = manifest["about"]
    for key, value in about.items():
        if value is not None and found.get(key) != value:
            other = {"run": "it is of another run", "made_from": "it was made from other settings"}
            return other.get(key, f"it is of {key} {found.get(key)}, not {value}")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in manifest["files"] and is_loaded(name) and path.is_file():
            return f"{name} was not written with it"
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest's content; None when it is not byte for byte what was written.

    Raises:
        OSError: it is missing or cannot be read.
    """
    manifest = unseal((folder / MANIFEST).read_bytes())
    return manifest if manifest is not None and {"about", "files"} <= manifest.keys() else None


def is_note(name: str) -> bool:
    """Whether a file (its path in the folder) is for people only and may change."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.suffix.lower() in _NOTES or path.stem.upper() in ("LICENSE", "NOTICE")


def is_loaded(name: str) -> bool:
    """Whether a library may read such a file (its path in the folder) when it loads a model or a tokenizer."""
    path = PurePosixPath(name)
    return not is_note(name) and (path.suffix in _LOADED or path.name in _LOADED_NAMES)


def measure(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file; raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": file.tell()}
