"""stdout, kept for results: whatever else prints while a command runs is heard on stderr.

A shell reads a result from stdout, `sft=$(rlpost train sft.yaml)`. What a user's function prints, or a library in C
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

_streams: list[TextIO] = []
"""Where results go, in commands that keep stdout for them."""


def emit(text: object, end: str = "\n") -> None:
    """Print a result.

    Raises:
        DiskError: stdout does not take it.
    """
    stream = output()
    if stream is not None:
        try:
            stream.write(f"{text}{end}")
            stream.flush()
        except OSError as error:
            raise _refused(stream, error) from error


def _refused(stream: TextIO, error: OSError) -> DiskError:
    """What to raise; where nobody reads on (`rlpost list | head -1`), the program ends without a word."""
    # What is left is dropped: the interpreter would try again at its end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if isinstance(error, BrokenPipeError):
        sys.exit(128 + signal.SIGPIPE)
    return DiskError(f"stdout: {error.strerror}; the result could not be written there")


def output() -> TextIO | None:
    """The stream that results go to; None where the program was started without a stdout."""
    return _streams[-1] if _streams else sys.stdout


@contextmanager
def kept_for_results() -> Iterator[None]:
    """Context in which only `emit` writes to stdout; what else is written there goes to stderr."""
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


def _descriptor_kept(stream: TextIO) -> int | None:
    """A copy of file descriptor 1, which is stderr from here on; None if the stream is not what writes to it."""
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
