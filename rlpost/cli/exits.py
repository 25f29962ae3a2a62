"""Exit codes, and one line on stderr for each error."""

from __future__ import annotations

import atexit
import os
import re
import sys
from contextlib import suppress
from typing import Any, NoReturn

import typer

from rlpost import ranks
from rlpost.cli.launchers import LAUNCHED
from rlpost.console import clean
from rlpost.errors import RankError, RecipeError, RlpostError, UnexpectedError
from rlpost.streams import broken, in_colour, open_streams

_UsageError: Any = typer.BadParameter.__mro__[2]
"""click's UsageError, or typer's own copy of it."""
_ELASTIC = "TORCHELASTIC_RUN_ID"
"""Set by torch's launcher for the processes that it starts."""
_LONGEST = 300
"""Longer words of a message are cut, in characters."""


def run(app: typer.Typer) -> NoReturn:
    """Run the command line, and exit."""
    open_streams()
    code: object = None
    try:
        _refuse_broken_text(sys.argv[1:])
        code = app(prog_name="rlpost", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except RlpostError as error:
        code = _fail(error)
    except _UsageError as error:
        code = _misused(error)
    except Exception as error:
        code = _unexpected(error)
    code = code if isinstance(code, int) else 0
    if (ranks.count() > 1 and _ELASTIC in os.environ) or "triton" in sys.modules:
        _end(code)
    sys.exit(code)


def _end(code: int) -> NoReturn:
    """End as `sys.exit` does, but leave the process's memory to the system.

    Of gloo's threads one may still run when what they stand on is taken down, and abort a rank: its launcher would say
    that it was killed. And Triton, which PyTorch and vLLM load, lists on stderr all that is left of it.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or its reader has left
            stream.flush()
    os._exit(code)


def _unexpected(error: Exception) -> int:
    from rlpost.unexpected import explained, was_interrupted

    if isinstance(error, typer.Abort) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # typer takes an EOFError for somebody at a prompt
    return 130 if was_interrupted(error) else _fail(explained(error))


def _misused(error: Any) -> int:
    """Print a usage error in one line, with the command whose help explains it."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    path: list[str] = []
    while context is not None and context.parent is not None:
        path.insert(0, context.info_name)
        context = context.parent
    message = re.sub(r"^Invalid value(?: for (.+?))?: ", lambda m: f"{m[1]}: " if m[1] else "", error.format_message())
    message = message.replace(": Value error, ", ": ")  # pydantic's words, by which typer reads choices
    return _fail(RecipeError(f"{message.rstrip('.')} - see `{' '.join(['rlpost', *path, '--help'])}`"))


def _refuse_broken_text(words: list[str]) -> None:
    for word in words:
        if broken(word):
            shown = word.encode("utf-8", "replace").decode()
            raise RecipeError(f"{shown}: an argument that is not UTF-8 - write it in UTF-8")


def _fail(error: RlpostError) -> int:
    words = (
        word if len(word) <= _LONGEST else f"{word[: _LONGEST // 2]}...{word[-40:]}" for word in str(error).split()
    )
    line = f"rlpost: {clean(' '.join(words))}"
    if _is_said_elsewhere(error, line):
        return error.exit_code
    print(f"\033[31m{line}\033[0m" if in_colour(sys.stderr) else line, file=sys.stderr)
    return error.exit_code


def _is_said_elsewhere(error: RlpostError, line: str) -> bool:
    """Whether another rank, or who started the ranks, says why the run ends."""
    if isinstance(error, UnexpectedError):
        return False
    if isinstance(error, RankError) and ranks.count() > 1:
        return LAUNCHED in os.environ or not ranks.is_first()
    return ranks.left_to_first(line)
