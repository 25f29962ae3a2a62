"""Files and folders that are written whole or not at all, and disk errors as one line."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlpost.errors import DiskError, RlpostError
from rlpost.ranks import first_alone, from_first, is_first
from rlpost.run.manifest import read_manifest, sync, verify, write_manifest
from rlpost.run.names import set_aside, unfinished

Json = Any
"""What the json module can write."""

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run the same command again",
    errno.ENFILE: "close other programs and run the same command again",
    errno.EACCES: "make it accessible or choose another folder with runs=FOLDER",
    errno.EPERM: "make it accessible or choose another folder with runs=FOLDER",
    errno.EROFS: "make it writable or choose another folder with runs=FOLDER",
    errno.ENOTDIR: "remove the file that stands in the way or choose another folder with runs=FOLDER",
    errno.EEXIST: "remove the file that stands in the way or choose another folder with runs=FOLDER",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into a DiskError of one line about `path`."""
    try:
        yield
    except RlpostError:
        raise
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else str(path)
        raise _disk_error(name, error.errno or errno.EIO) from error
    except Exception as error:
        # safetensors and tokenizers put the system's error into the text of an exception of their own.
        match = _RUST_ERROR.search(str(error))
        if match is None:
            raise
        raise _disk_error(str(path), int(match[1])) from error


def _disk_error(path: str, number: int) -> DiskError:
    remedy = _REMEDIES.get(number, "check the disk and run the same command again")
    return DiskError(f"{path}: {os.strerror(number)}; {remedy}")


@first_alone
def write_atomic(path: Path, data: bytes) -> None:
    """Write the file whole or not at all; raises DiskError."""
    temporary = unfinished(path)
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@first_alone
def write_folder_atomically(folder: Path, fill: Callable[[Path], None], about: Mapping[str, Json]) -> None:
    """Write the folder whole or not at all: `fill` writes into a temporary one, which gets a manifest.

    A folder of that name is replaced, or left as it is when it holds the same files.

    Raises:
        DiskError: it could not be written: then nothing is left behind, or all of it when only the very last
            flush failed. Or it reads back differently, which every reader will detect.
    """
    temporary = unfinished(folder)
    with disk_errors(folder):
        try:
            discard(temporary)
            temporary.mkdir(parents=True)
            fill(temporary)
            write_manifest(temporary, about)
            if not _same(temporary, folder):
                _swap(temporary, folder)
                sync(folder.parent)
        finally:
            discard(temporary)
            if folder.exists():
                discard(set_aside(folder))
        wrong = verify(folder)
    if wrong:
        raise DiskError(f"{folder}: {wrong} right after it was written; check the disk")


@contextmanager
def shared_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder that all ranks write into, next to `beside`; it is gone afterwards. Raises DiskError."""
    folder = from_first(lambda: _made(unfinished(beside.with_name(f"{beside.name}.parts"))))
    try:
        yield folder
    finally:
        if is_first():  # alone: after an error the others may not come here
            _remove(folder)


def _made(folder: Path) -> Path:
    with disk_errors(folder):
        _remove(folder)
        folder.mkdir(parents=True)
    return folder


def _same(one: Path, other: Path) -> bool:
    if not other.exists() or verify(other):
        return False
    first, second = read_manifest(one), read_manifest(other)
    return first is not None and first == second


def _swap(temporary: Path, folder: Path) -> None:
    old = set_aside(folder)
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise


@first_alone
def discard(path: Path) -> None:
    """Remove a temporary file or folder if it is there.

    What cannot be removed stays until the next resume: an error here would hide the original one.
    """
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        # rmtree needs file descriptors, which may have run out; rmdir of an empty folder does not.
        with suppress(OSError):
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


@first_alone
def remove_folder(folder: Path) -> None:
    """Remove a folder so that a kill leaves no half of it under its own name; raises DiskError."""
    temporary = unfinished(folder)
    with disk_errors(folder):
        folder.rename(temporary)
        shutil.rmtree(temporary)


@first_alone
def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing in the folder, and put back what it was replacing."""
    with disk_errors(folder):
        for path in sorted(folder.glob("*.old.tmp-*")):
            whole = path.with_name(path.name.partition(".old.tmp-")[0])
            if not whole.exists():
                path.rename(whole)
        for path in sorted(folder.glob("*.tmp-*")):
            discard(path)


def encode_line(row: Mapping[str, Json]) -> bytes:
    """One line of JSON, with null for numbers that are not finite."""
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair cannot be written as UTF-8; its backslash form is the JSON escape for it.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _finite(value: Json) -> Json:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_json(path: Path, value: Json) -> None:
    """Write the value as readable JSON, whole or not at all; raises DiskError."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Json:
    """The value in a JSON file; raises DiskError when it cannot be read."""
    with disk_errors(path):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise DiskError(f"{path}: not JSON ({error}); restore it or choose another run=NAME") from error
