"""The process's own streams where one is closed, is a terminal, or knows few letters."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from rlpost.errors import RecipeError


def open_streams() -> None:
    """See that stdin, stdout and stderr are there, and that stdout can write every character.

    A closed one (`>&-`) is replaced by the null device: otherwise a file that is opened later takes its number, and
    messages are written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - as long as we live
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def from_stdin(what: str) -> str:
    """All of stdin, without a line break at its end; `what` it is, for errors.

    Raises:
        RecipeError: it is a terminal, or not UTF-8.
    """
    if sys.stdin.isatty():
        raise RecipeError(f"{what}: missing - give it as an argument or on stdin")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{what}: stdin is not UTF-8 at byte {error.start} - save it as UTF-8") from error
    if broken(text):  # in a C locale bytes that are no text come through as halves of characters
        raise RecipeError(f"{what}: stdin is not UTF-8 - save it as UTF-8")
    return text.removesuffix("\n")


def broken(text: str) -> bool:
    """Whether it holds halves of characters, which cannot be encoded: bytes that were not UTF-8."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person may be reading it as it is written."""
    return stream is not None and not stream.closed and stream.isatty()


def in_colour(stream: TextIO | None) -> bool:
    """Whether colours are welcome there."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
