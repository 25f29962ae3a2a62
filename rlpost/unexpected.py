"""Reports an unexpected error: one line with its location, and its traceback in a file."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlpost.errors import DiskError, OutOfMemoryError, RlpostError, UnexpectedError

LOG = "error.log"
_PACKAGE = Path(__file__).parent
_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""Texts of the plain RuntimeErrors that torch raises when memory is short."""


@contextmanager
def traceback_kept(folder: Path) -> Iterator[None]:
    """Turn an unexpected error inside into one line, with its traceback in `folder`/error.log.

    Raises:
        RlpostError: as `explained`.
    """
    try:
        yield
    except RlpostError:
        raise
    except Exception as error:
        raise explained(error, folder / LOG) from error


def explained(error: Exception, log: Path | None = None) -> RlpostError:
    """The error in one line; its traceback goes to `log`, or to a temporary file.

    An error of the operating system (a path too long, no permission, a full disk) needs no traceback.
    """
    if isinstance(error, OSError) and error.errno is not None and error.strerror is not None:
        name = error.filename if isinstance(error.filename, str) else location_of(error)
        shown = name if len(name) <= 200 else f"{name[:80]}...{name[-40:]}"
        return DiskError(f"{shown}: {error.strerror}; use another path, or make this one accessible")
    where = _kept(error, log)
    first = next(iter(str(error).splitlines()), "")[:300] or "no message"
    if of_memory(error):
        return OutOfMemoryError(
            f"out of memory at {location_of(error)}: {first} - lower the stage's max_tokens_per_microbatch or "
            "model.lora.r, set model.gradient_checkpointing=true, or lower prompts_per_step, group_size, batch_size or "
            "max_new_tokens; "
            f"a run goes on from its last checkpoint ({where})"
        )
    return UnexpectedError(
        f"unexpected {type(error).__name__} at {location_of(error)}: {first} - a bug in rlpost or a package below it: "
        f"please report it with its traceback ({where})"
    )


def location_of(error: BaseException) -> str:
    """`rlpost/train/loop.py:88`: the last line of this package that the error passed through; else of any file."""
    frames = [(Path(f.f_code.co_filename), line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if file.is_relative_to(_PACKAGE)]
    if not own and not frames:
        return "an unknown place"
    file, line = (own or frames)[-1]
    return f"{file.relative_to(_PACKAGE.parent) if own else file}:{line}"


def was_interrupted(error: BaseException | None) -> bool:
    """Whether it comes from Ctrl-C, which an import of a C extension turns into another error."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def of_memory(error: Exception) -> bool:
    """Whether it says that the GPU's or the machine's memory is short."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OF_MEMORY))


def _kept(error: Exception, log: Path | None) -> str:
    """Write the traceback; returns where it is, or why it could not be written."""
    text = f"{shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        if log is None:
            number, name = tempfile.mkstemp(prefix="rlpost-", suffix=".log")
            os.close(number)
            log = Path(name)
        log.write_text(text, "utf-8", "backslashreplace")
    except OSError as refused:
        return f"it could not be written to {log}: {refused.strerror or refused}"
    return f"in {log}"
