"""stdin, stdout and stderr: closed ones, terminals, narrow encodings."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from rlpost.errors import RecipeError


def open_streams() -> None:
    """Make sure that stdin, stdout and stderr are open, and that stdout can write every character.

    A closed one (`>&-`) is replaced by the null device: otherwise a file opened later would get its number, and
    messages would be written into that file.
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
    """All of stdin, without a final line break; `what` names it in errors.

    Raises:
        RecipeError: it is a terminal, or not UTF-8.
    """
    if sys.stdin.isatty():
        raise RecipeError(f"{what}: missing - give it as an argument or on stdin")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{what}: stdin is not UTF-8 at byte {error.start} - save it as UTF-8") from error
    if broken(text):  # in a C locale, bytes that are not UTF-8 arrive as surrogates
        raise RecipeError(f"{what}: stdin is not UTF-8 - save it as UTF-8")
    return text.removesuffix("\n")


def broken(text: str) -> bool:
    """Whether it holds surrogates, which stand for bytes that were not UTF-8."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether it is an open terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def in_colour(stream: TextIO | None) -> bool:
    """Whether to write colours to it."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
