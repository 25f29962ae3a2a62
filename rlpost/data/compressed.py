"""Opens files for reading, compressed (.gz, .zst) or not."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from rlpost.errors import DataError

COMPRESSED = (".gz", ".zst")
_OTHER = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""How a file begins that is no text in UTF-8, and what it is."""


def kind_of(path: Path) -> str:
    """The suffix that tells how a file is read, of a compressed file the one before: ".jsonl" of rows.jsonl.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed as they are read.

    Raises:
        DataError: it cannot be read, or its compressed data is damaged; also while it is read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as file:
                yield _checked(cast("io.BufferedReader", file), path)
        elif suffix == ".zst":
            import pyarrow

            with path.open("rb"), io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")) as file:
                yield _checked(file, path)
        else:
            with path.open("rb") as file:
                yield _checked(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not readable gzip data ({error}): is the file complete?") from error
    except OSError as error:
        damaged = suffix == ".zst" and error.strerror is None
        raise DataError(
            f"{path}: not readable zstd data ({error}): is the file complete?"
            if damaged
            else f"{path}: {error.strerror or error}"
        ) from error


def _checked(file: io.BufferedReader, path: Path) -> IO[bytes]:
    """The file; raises DataError if its first bytes are those of another kind of file."""
    head = file.peek(4)
    for magic, what in _OTHER.items():
        if head.startswith(magic):
            inside = " inside" if path.suffix.lower() in COMPRESSED else ""
            raise DataError(
                f"{path}: it holds {what}{inside}, not UTF-8: convert it, or give it the suffix of what it is"
            )
    return file
