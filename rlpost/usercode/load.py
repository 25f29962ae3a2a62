"""Runs a user's file; nothing else does."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from rlpost.usercode.episodes import as_function, is_environment

_PACKAGE = Path(__file__).parents[1]


def load(file: Path, digest: str) -> ModuleType:
    """The user's file as a module, loaded once per content; `digest` is its sha256. Raises what the file raises."""
    name = f"_rlpost_user_{hashlib.sha256(f'{file}{digest}'.encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module while it loads
    # No bytecode cache: it has a resolution of a second, so it would hide a quick edit.
    caching, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = caching
    return module


def public_functions(module: ModuleType) -> dict[str, Any]:
    """The functions that a recipe may name: those defined in the module, or in `__all__` of one of rlpost's.

    A class environment is one, too; made anew each time, with its episodes.
    """
    exported = getattr(module, "__all__", None) if module.__name__.startswith("rlpost.") else None
    return {
        key: as_function(value) if is_environment(value) else value
        for key, value in vars(module).items()
        if (inspect.isfunction(value) or is_environment(value))
        and not key.startswith("_")
        and (value.__module__ == module.__name__ if exported is None else key in exported)
    }


def raised(error: BaseException, file: Path) -> str:
    """`raised ValueError: no digits at my.py:3`: an exception of a user's code, with the line of their file."""
    message, location = _described(error, file)
    return f"raised {message}" + (f" at {location}" if location else "")


def not_loaded(error: BaseException, file: Path) -> str:
    """`my.py:3: ValueError: no digits`: why a user's file does not load."""
    message, location = _described(error, file)
    return f"{location or file}: {message}"


def _described(error: BaseException, file: Path) -> tuple[str, str]:
    """Type and message in one line, and the last line of the user's file in the traceback; none of rlpost's files."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg}", f"{error.filename}:{error.lineno}"
    message = " ".join(str(error).split()) or "(no message)"
    message = message if len(message) <= 300 else f"{message[:299]}…"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    ours = file.is_relative_to(_PACKAGE)
    return f"{type(error).__name__}: {message}", f"{file}:{lines[-1]}" if lines and not ours else ""
