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
                yield cast("IO[bytes]", file)
        elif suffix == ".zst":
            import pyarrow

            with path.open("rb"), io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")) as file:
                yield file
        else:
            with path.open("rb") as file:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not readable gzip data ({error}): is the file complete?") from error
    except OSError as error:
        damaged = suffix == ".zst" and error.strerror is None
        raise DataError(
            f"{path}: not readable zstd data ({error}): is the file complete?"
            if damaged
            else f"{path}: {error.strerror or error}"
        ) from error
