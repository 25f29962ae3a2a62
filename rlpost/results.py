"""Keeps stdout for results: whatever else is printed while a command runs goes to stderr.

A shell reads a result from stdout, `sft=$(rlpost train sft.yaml)`. Output of a user's function, or of a C library that
writes to file descriptor 1, must not end up in it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rlpost.errors import DiskError
from rlpost.ranks import is_first

_streams: list[TextIO] = []
"""The streams that results go to, in commands that keep stdout for them."""


def emit(text: object, end: str = "\n") -> None:
    """Print a result; of the ranks of a run the first one does.

    Raises:
        DiskError: stdout cannot be written.
    """
    stream = output()
    if stream is not None and is_first():
        try:
            stream.write(f"{text}{end}")
            stream.flush()
        except OSError as error:
            raise _refused(stream, error) from error


def _refused(stream: TextIO, error: OSError) -> DiskError:
    """The error to raise; if the reader is gone (`rlpost list | head -1`), exit silently."""
    # Drop what is buffered: the interpreter would try to write it at exit, and fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if isinstance(error, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    return DiskError(f"stdout: {error.strerror}; the result could not be written there")


def output() -> TextIO | None:
    """The stream that results go to; None where the program was started without a stdout."""
    return _streams[-1] if _streams else sys.stdout


@contextmanager
def kept_for_results() -> Iterator[None]:
    """Inside, only `emit` writes to stdout; all other output to it goes to stderr."""
    before = sys.stdout
    if before is None or before.closed:
        yield
        return
    before.flush()
    kept = _descriptor_kept(before)
    if kept is not None:
        _streams.append(os.fdopen(kept, "w", encoding=before.encoding, errors=before.errors))
    else:
        _streams.append(before)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = before
        stream = _streams.pop()
        if kept is not None:
            os.dup2(kept, 1)
            stream.close()


@contextmanager
def given_to_children() -> Iterator[None]:
    """Inside, processes that are started have the results' stream as their stdout."""
    stream = output()
    kept = os.dup(1)
    try:
        if stream is not None:
            os.dup2(stream.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _descriptor_kept(stream: TextIO) -> int | None:
    """A copy of file descriptor 1, which is redirected to stderr; None if the stream does not write to it."""
    try:
        if stream.fileno() != 1:
            return None
    except (OSError, ValueError):  # a stream in memory has no descriptor
        return None
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
    except OSError:  # started without a stderr
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
    return kept
